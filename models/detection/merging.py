"""Objects of a picture as masks: how they overlap, and which are kept when a detector has looked again.

Source: CutLER (CVPR 2023), self-training. A old and B new masks of one picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def overlaps(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of masks bool [A,H,W] and [B,H,W], each with each: float32 [A,B]; 0 where both are
    empty."""
    first, second = (part.flatten(1).float() for part in (one, two))
    common = first @ second.T
    union = first.sum(1)[:, None] + second.sum(1) - common
    return common / union.clamp(min=1)


@dataclass(frozen=True)
class Merged:
    """What stays, new ones first."""

    new: Tensor
    """int64: rows of the new masks that are sure enough, in their order."""
    old: Tensor
    """int64: rows of the old ones that none of these covers."""
    shared: Tensor
    """float32 [A,kept new]: how they overlap."""


def merge(old: Tensor, new: Tensor, scores: Tensor, sure: float, overlap: float = 0.5) -> Merged:
    """Of new masks bool [B,H,W] those with scores [B] of at least `sure`, and of old ones bool [A,H,W] those whose
    largest overlap with these is below `overlap`. Without a sure one all old ones stay."""
    kept = (scores >= sure).nonzero()[:, 0]
    shared = overlaps(old, new[kept])
    free = (shared < overlap).all(1)
    return Merged(kept, free.nonzero()[:, 0], shared)


def paint(masks: Tensor, scores: Tensor) -> Tensor:
    """Masks bool [n,H,W] as one map int64 [H,W]: 0 nothing, else the row + 1 of the mask of highest score there, of
    equals the first."""
    ids = torch.zeros(masks.shape[1:], dtype=torch.int64, device=masks.device)
    for row in scores.argsort(descending=True, stable=True).tolist():
        ids = torch.where(masks[row] & (ids == 0), row + 1, ids)
    return ids
