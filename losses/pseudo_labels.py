"""Learning from pseudo-labels: cross-entropy (self-training of Deep Spectral Methods, CVPR 2022); cross-entropy with
classes weighed by how little they are predicted, and the vote that makes a label of every mask (PriMaPs, TMLR 2024)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import real
from common.spec import IGNORE
from losses.correspondence import same


def pseudo_label_loss(logits: Tensor, labels: Tensor, total: Tensor | None = None) -> Tensor:
    """Mean cross-entropy of logits [B,K,h,w], enlarged bilinearly to labels int64 [B,H,W]; 255 is left out.

    total: number of labelled pixels that the sum is divided by, where it is not this batch's own (several ranks: their
    mean). 0, with a graph, where no pixel has a label. float32 (float64 for float64 logits), also inside autocast.
    """
    with torch.autocast(logits.device.type, enabled=False):
        maps = F.interpolate(real(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        summed = F.cross_entropy(maps, labels, ignore_index=IGNORE, reduction="sum")
        count = (labels != IGNORE).sum() if total is None else total
        return summed / count.clamp(min=1)


def balanced_cross_entropy(
    logits: Tensor, labels: Tensor, gamma: float, average: Callable[[Tensor], Tensor] = same
) -> tuple[Tensor, Tensor]:
    """Cross-entropy that counts the less, the more a class is predicted: (loss, class weights [K]).

    logits [B,K,h,w] are enlarged bilinearly to labels int64 [B,H,W]; 255 is left out. The weight of class k is
    (1 - mean softmax of k)^gamma, over all pixels whether labelled or not, detached; the sum over labelled pixels of
    weight times cross-entropy is divided by the number of all pixels. average: mean over ranks of a tensor, which makes
    the weights those of the global batch. float32 (float64 for float64 logits), also inside autocast.
    """
    with torch.autocast(logits.device.type, enabled=False):
        maps = F.interpolate(real(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        share = average(maps.detach().softmax(1).mean((0, 2, 3)))
        weights = (1 - share) ** gamma
        summed = F.cross_entropy(maps, labels, weights, ignore_index=IGNORE, reduction="sum")
        return summed / labels.numel(), weights


@torch.no_grad()
def majority(masks: Tensor, prediction: Tensor, classes: int, outside: int = IGNORE) -> Tensor:
    """Every mask gets the class that is predicted most often inside it, of equals the lowest: int64 [B,H,W].

    masks int64 [B,H,W]: ids of 0 and more, counted for each picture by itself; `outside` is no mask and stays.
    prediction int64 [B,H,W] in 0..classes-1.
    """
    inside = masks != outside
    ids = torch.where(inside, masks, 0)
    most = int(ids.max()) + 1
    pictures = torch.arange(len(ids), device=ids.device)[:, None, None]
    cells = (pictures * most + ids) * classes + prediction
    counts = torch.bincount(cells[inside], minlength=len(ids) * most * classes).view(-1, classes)
    best = (counts * classes + torch.arange(classes - 1, -1, -1, device=ids.device)).argmax(1)
    return torch.where(inside, best[pictures * most + ids], outside)
