"""Losses of a detector that does not take its labels for complete, and their share of the whole batch.

Source: CutLER (CVPR 2023), DropLoss. Shapes: R sampled boxes, G labelled boxes of their picture, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import box_iou

from common import distributed


@torch.no_grad()
def best_overlap(boxes: Tensor, labelled: Tensor) -> Tensor:
    """The largest overlap (intersection over union) of boxes [R,4] with any of the labelled ones [G,4]: [R]; 0 where
    none is labelled."""
    if not len(labelled):
        return boxes.new_zeros(len(boxes))
    return box_iou(boxes.detach(), labelled.to(boxes)).amax(1)


@torch.no_grad()
def drop_weights(overlaps: Tensor, threshold: float | None) -> Tensor:
    """DropLoss: 0 for a box that overlaps no labelled one by more than `threshold`, so that an object without a label
    is not taught to be background; else 1. None: 1 for all."""
    return torch.ones_like(overlaps) if threshold is None else (overlaps > threshold).to(overlaps)


def class_loss(logits: Tensor, classes: Tensor, weights: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Weighted cross-entropy of logits [R,C+1] with classes int64 [R], as a mean over all R, those of weight 0 too.

    count: what is divided by in place of R.
    """
    losses = F.cross_entropy(logits, classes, reduction="none")
    return (weights * losses).sum() / (max(len(classes), 1) if count is None else count)


def shared_count(count: int, like: Tensor) -> Tensor:
    """What a sum over this rank's boxes is divided by, so that the mean of the ranks' losses is the mean over the boxes
    of all ranks: a rank's average share, at least one box in all. A collective."""
    world = distributed.world_size()
    return distributed.total(like.new_tensor(float(count))).clamp(min=1) / world
