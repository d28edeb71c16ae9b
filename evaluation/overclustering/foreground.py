"""Cluster-based foreground extraction: clusters that lie on a noisy foreground are the foreground (Leopart, CVPR
2022).

A noisy mask of each picture votes for whole clusters: precision[k] is the mean, over the pictures that show cluster k,
of the share of its pixels inside the mask. What is in a cluster of high precision is foreground in every picture, also
where the mask missed it.

Id maps int64 [H,W] with ids 0..K-1 and masks bool [H,W], one of each picture; sizes may differ from picture to picture.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import one_of
from common.spec import IGNORE

SPAN = 0.55, 0.75
"""Of K clusters in order of precision: where the foreground may begin, if labels choose."""
BOUNDARIES = "foreground", "background", "out"
"""What pixels without a label are to `overlap`: foreground (as released where labels choose), background (as released
where the result is scored), or left out."""
STEP = 0.05
"""Thresholds that labels choose are multiples of it, below 1."""


def precisions(clusters: Sequence[Tensor], masks: Sequence[Tensor], k: int) -> Tensor:
    """Precision of every cluster, float64 [K], 0 to 1; 0 of a cluster that no picture shows."""
    total, shown = (torch.zeros(k, dtype=torch.float64) for _ in range(2))
    for ids, mask in zip(clusters, masks, strict=True):
        ids, inside = ids.flatten().cpu(), mask.flatten().cpu().bool()
        pixels = torch.bincount(ids, minlength=k).double()
        total += torch.bincount(ids[inside], minlength=k) / pixels.clamp(min=1)
        shown += pixels > 0
    return total / shown.clamp(min=1)


def above(precision: Tensor, threshold: float) -> Tensor:
    """The foreground clusters by increasing precision [K]: int64 [n], those of at least `threshold`."""
    values, order = precision.sort(stable=True)
    return order[int((values < threshold).sum()) :]


def overlap(foreground: Sequence[Tensor], truth: Sequence[Tensor], objects: Sequence[int], boundary: str) -> float:
    """Mean over pictures of the IoU of foreground masks and label maps int64 [H,W], 0 to 1; pictures where both are
    empty count as 1.

    objects: class ids. boundary: see BOUNDARIES.
    """
    one_of("boundary", boundary, BOUNDARIES)
    found = []
    wanted = torch.tensor([*objects, *([IGNORE] if boundary == "foreground" else [])])
    for mask, label in zip(foreground, truth, strict=True):
        known = label != IGNORE if boundary == "out" else torch.ones_like(mask)
        true = torch.isin(label, wanted.to(label.device))
        union = int(((mask | true) & known).sum())
        found.append(int((mask & true & known).sum()) / union if union else 1.0)
    return float(np.mean(found)) if found else float("nan")


def cuts(
    clusters: Sequence[Tensor], truth: Sequence[Tensor], objects: Sequence[int], precision: Tensor
) -> list[tuple[float, int, float]]:
    """What labels say of the places where the foreground may begin: (precision there, place, IoU), worst IoU first.

    READS LABELS. A place is a number of clusters, in order of precision, that stay out; see SPAN. IoU: `overlap`,
    pixels without a label being foreground.
    """
    values, order = precision.sort(stable=True)
    found = []
    for start in range(*(int(share * len(order)) for share in SPAN)):
        inside = torch.zeros(len(order), dtype=torch.bool)
        inside[order[start:]] = True
        masks = [inside.to(ids.device)[ids] for ids in clusters]
        found.append((float(values[start]), start, overlap(masks, truth, objects, boundary="foreground")))
    return sorted(found, key=lambda cut: cut[2])


def chosen(found: Sequence[tuple[float, int, float]]) -> float:
    """The threshold that the best of `cuts` stands for: the multiple of STEP from 0 to 0.95 nearest to its precision;
    of two the lower one."""
    grid = np.arange(0, 1, STEP)
    return float(grid[np.abs(grid - found[-1][0]).argmin()])
