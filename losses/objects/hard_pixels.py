"""Cross-entropy of the hardest pixels alone, by which MaskDistill (Van Gansbeke et al., 2022) trains its segmenter."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import real
from common.spec import IGNORE
from losses.correspondence import same


def hard_pixel_loss(
    logits: Tensor, labels: Tensor, share: float, gather: Callable[[Tensor], Tensor] = same, rank: int = 0
) -> tuple[Tensor, Tensor]:
    """(loss, number of pixels in it): mean cross-entropy of the pixels that have the largest one.

    logits [B,K,h,w] are enlarged bilinearly to labels int64 [B,H,W]; 255 is left out. Counted are `share` of all pixels
    of the batch, labelled or not, rounded down, but no more than are labelled; where that is none the loss is 0, with a
    graph. Which pixels count has no gradient. float32 (float64 for float64 logits), also inside autocast.
    gather: rows of all ranks in rank order, of which this is `rank`: the hardest of the global batch count, and the
    mean of the ranks' losses is that of one process.
    """
    with torch.autocast(logits.device.type, enabled=False):
        maps = F.interpolate(real(logits), size=labels.shape[-2:], mode="bilinear", align_corners=False)
        losses = F.cross_entropy(maps, labels, ignore_index=IGNORE, reduction="none").flatten()
        known = (labels != IGNORE).flatten()
        whole = gather(torch.where(known, losses.detach(), -1.0))
        count = (whole >= 0).sum().clamp(max=int(share * len(whole)))
        chosen = torch.zeros_like(whole, dtype=torch.bool)
        chosen[whole.topk(int(count)).indices] = True
        own = chosen[rank * len(losses) :][: len(losses)]
        world = len(whole) // len(losses)
        return torch.where(own, losses, 0.0).sum() * world / count.clamp(min=1), count
