"""Learning from pseudo-labels. Source: the self-training of Deep Spectral Methods (CVPR 2022): cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import real
from common.spec import IGNORE


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
