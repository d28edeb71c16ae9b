"""Levels of groups inside a picture against its labels: how well regions are met, and whether levels are nested.

Groups have no meaning beyond their picture, so no score of classes can read them. Here every labelled region (all
pixels of one class in one picture) looks for the group of a level that covers it best, as the paper's foreground
covering does (HSG, Ke et al., CVPR 2022).
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation import readout
from evaluation.readouts import Readout


class LevelAgreement(Metric):
    """For one level: `iou`, the mean over labelled regions of the best intersection over union with any group of their
    picture, in percent. Only pixels with a label and a group count, also in the area of a group."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    covered: Tensor
    regions: Tensor

    def __init__(self, classes: int, **kwargs: Any):
        super().__init__(**kwargs)
        self.classes = classes
        self.add_state("covered", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("regions", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, groups: Tensor, label: Tensor) -> None:
        """Add pictures: groups int64 [B,H,W], -1 where there is none; label [B,H,W], only 0..C-1 counts."""
        counted = (groups >= 0) & (label >= 0) & (label < self.classes)
        for own, truth, inside in zip(groups, label, counted, strict=True):
            if not inside.any():
                continue
            count = int(own.max()) + 1
            cells = own[inside] * self.classes + truth[inside]
            both = torch.bincount(cells, minlength=count * self.classes).view(count, self.classes).double()
            union = both.sum(1, keepdim=True) + both.sum(0) - both
            best = (both / union.clamp(min=1)).amax(0)
            present = both.sum(0) > 0
            self.covered += best[present].sum()
            self.regions += present.sum()

    def compute(self) -> Tensor:
        """Percent; NaN where no region was seen."""
        return 100 * self.covered / self.regions


class Nesting(Metric):
    """The share of pixels that keep the hierarchy, in percent: 100 where every group is a union of groups below it.

    A pixel keeps it where, at every level, its group is the one that most pixels of its group below are in.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    kept: Tensor
    pixels: Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.add_state("kept", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("pixels", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, levels: list[Tensor]) -> None:
        """Add pictures: a map int64 [B,H,W] of every level, the finest first; -1 where there is no group."""
        for maps in zip(*levels, strict=True):
            inside = maps[0] >= 0
            kept = torch.ones_like(inside)
            for lower, upper in pairwise(maps):
                rows, columns = int(lower.max()) + 1, int(upper.max()) + 1
                if rows <= 0 or columns <= 0:
                    continue
                both = torch.bincount(lower[inside] * columns + upper[inside], minlength=rows * columns)
                kept &= upper == both.view(rows, columns).argmax(1)[lower.clamp(min=0)]
            self.kept += (kept & inside).sum()
            self.pixels += inside.sum()

    def compute(self) -> Tensor:
        """Percent; NaN without pixels."""
        return 100 * self.kept.double() / self.pixels


class HierarchyReadout(Readout):
    """`val/hierarchy/*`: `<level>_iou` of every level where there are labels, and `nested`.

    levels: their names, the finest first; the method has `levels(images, valid)`, which gives their maps at cells
    [B,h,w] in that order.
    """

    name = "hierarchy"

    def __init__(self, levels: tuple[str, ...], classes: int, rule: str) -> None:
        super().__init__()
        self.groups, self.rule = levels, rule
        known = levels if classes else ()
        self.agreement = torch.nn.ModuleDict({f"{name}_iou": LevelAgreement(classes) for name in known})
        self.nesting = Nesting()

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        valid = batch["valid"]
        maps = pixel_maps(model.levels(batch["image"], valid), valid)
        self.nesting.update(maps)
        if "label" in batch:
            for metric, level in zip(self.agreement.values(), maps, strict=True):
                metric.update(level, batch["label"])
        return dict(zip(self.groups, maps, strict=True))

    def compute(self) -> dict[str, float]:
        found = {name: float(metric.compute()) for name, metric in self.agreement.items()}
        return found | {"nested": float(self.nesting.compute())}

    def reset(self) -> None:
        self.nesting.reset()
        for metric in self.agreement.values():
            metric.reset()

    def protocol(self) -> str:
        return self.rule


def pixel_maps(maps: list[Tensor], valid: Tensor) -> list[Tensor]:
    """Maps of cells [B,h,w] at the pixels of `valid` [B,H,W], nearest; -1 where a pixel is not valid."""
    size = tuple(valid.shape[-2:])
    return [readout.upsample_ids(level, size).where(valid, -1) for level in maps]
