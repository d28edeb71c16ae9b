"""A detector looks at the training pictures again: its sure detections, and the masks of before that they leave."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional as F

import config
from datamodules.base.transforms import Geometry
from lightning_modules.detection.loop import take_weights
from lightning_modules.detection.training import make_detector
from lightning_modules.families.graph_cuts import patch_of, stage_geometry, stage_sides
from models.backbone import Backbone
from models.detection.merging import merge
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, Results, new_record, whole_patches


class Relabelled(MapStep):
    """`masks` bool [n,h,w] and `scores` float32 [n] of every training picture: detections of score `sure` and more, and
    of the masks before (whose score becomes 0, so that detections lie on them) those that overlap none of these by
    `method.rounds.overlap`. A picture without a sure detection keeps its masks.

    Dropped as `no_object` where nothing is left.
    """

    counted = "masks"

    def __init__(self, cfg: DictConfig, backbone: Backbone, number: int, needs: Sequence[str]) -> None:
        """needs: the steps of the masks of before and of the detector."""
        super().__init__(backbone if backbone.frozen else None)
        self.cfg, self.number = cfg, number
        self.name, self.needs = f"masks_{number}", tuple(needs)
        self.detector = make_detector(cfg, backbone)
        self.seeing = backbone if backbone.frozen else copy.deepcopy(backbone)
        self.sure = float(cfg.method.rounds.sure[number - 1])

    def settings(self) -> dict[str, Any]:
        own = config.plain(self.cfg.method)
        kept = {key: own["rounds"][key] for key in ("most", "overlap", "cell")}
        return kept | {"sure": self.sure, "detector": own["detector"]}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg.method.stage, self.cfg.data.interpolation)

    def record_bytes(self) -> int:
        own = self.cfg.method.rounds
        height, width = stage_sides(self.cfg.method.stage, self)
        return own.most * int(height * width / own.cell**2 / 8 + 8) + 1000

    def begin(self, results: Results) -> None:
        self.before = results[self.needs[0]]
        take_weights(results[self.needs[1]].state(), self.detector, self.seeing)
        self.detector.eval()

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = whole_patches(batch, patch_of(self.seeing))
        size = tuple(images.shape[-2:])
        grid = tuple(-(-side // self.cfg.method.rounds.cell) for side in size)
        found = []
        for row, one in enumerate(self.detector.detect(self.seeing.features(images).levels, size)):
            before = self.before.read(int(batch["index"][row]), ["masks"])
            old = torch.from_numpy(before.fields["masks"]) if before.keep else torch.zeros(0, *grid, dtype=torch.bool)
            old = resized(old.to(images.device), size)
            most = self.cfg.method.rounds.most
            kept = merge(old, one.masks[:most], one.scores[:most], self.sure, self.cfg.method.rounds.overlap)
            masks = resized(torch.cat([one.masks[kept.new], old[kept.old]]), grid)
            scores = torch.cat([one.scores[kept.new], one.scores.new_zeros(len(kept.old))]).float()
            seen = masks.any(2).any(1)
            found.append(new_record(batch, row, images, grid, masks=masks[seen], scores=scores[seen]))
            found[-1].drop = "" if bool(seen.any()) else "no_object"
        return found


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks bool [n,h,w] on another grid: bool [n,H,W], true where at least half of a place is."""
    if not len(masks):
        return masks.new_zeros(0, *size)
    smaller = size[0] < masks.shape[1]
    values = masks[:, None].float()
    values = F.interpolate(values, size, mode="area") if smaller else F.interpolate(values, size, mode="nearest-exact")
    return values[:, 0] >= 0.5
