"""The offline stage of PriMaPs-EM: every picture's principal masks, refined at its own resolution.

Source: Hahn et al., TMLR 2024. B pictures, T masks of one, h x w patches, H x W px of what the network saw.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from datamodules.base.transforms import Geometry
from evaluation import readout
from evaluation.crf import DenseCRF, as_bytes
from grouping.principal import label_log_probs, principal_masks
from lightning_modules.families.graph_cuts import patch_of, stage_geometry, stage_sides
from models.backbone import Backbone
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, new_record, whole_patches


class PrincipalMasks(MapStep):
    """Fields `segments` uint8 [H,W], 0 where no mask is, and `names` uint8 [T], the masks that are left of those that
    were found, in the order in which they were. No chance in it."""

    name = "masks"
    counted = "names"

    def __init__(self, backbone: Backbone, cfg: Any) -> None:
        super().__init__(backbone)
        self.method, self.interpolation = cfg.method, cfg.data.interpolation
        self.crf = DenseCRF() if cfg.method.masks.crf == "dense" else None

    def settings(self) -> dict[str, Any]:
        return dict(self.method.masks)

    def geometry(self) -> Geometry:
        return stage_geometry(self.method.stage, self.interpolation)

    def record_bytes(self) -> int:
        height, width = stage_sides(self.method.stage, self)
        return int(height * width) + 1000

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = whole_patches(batch, patch_of(self.backbone))
        maps = self.backbone.features(images).concat()
        if self.method.masks.centred:
            maps = maps - maps.mean((2, 3), keepdim=True)
        found = principal_masks(maps, self.method.masks.threshold, self.method.masks.sign)
        labels = refined(self.crf, images, [label_log_probs(stack.masks)[0] for stack in found])
        records = []
        for row, segments in enumerate(labels):
            names = segments.unique()
            fields = {"segments": segments.to(torch.uint8), "names": names[names > 0].to(torch.uint8)}
            records.append(new_record(batch, row, images, tuple(segments.shape), **fields))
        return records


def refined(crf: DenseCRF | None, images: Tensor, log_probs: Sequence[Tensor]) -> list[Tensor]:
    """The best of background and masks at every pixel, int64 [H,W] of each of the pictures [B,3,H,W] in 0..1, after the
    mean field; log_probs [T+1,h,w] of each, T its own. Pictures with as many masks share a lattice where there is room.
    """
    size = tuple(images.shape[-2:])
    if crf is None:
        return [readout.predict(maps[None], size)[0] for maps in log_probs]
    groups: dict[int, list[int]] = {}
    for row, maps in enumerate(log_probs):
        groups.setdefault(len(maps), []).append(row)
    found: dict[int, Tensor] = {}
    for rows in groups.values():
        (beliefs,) = crf(as_bytes(images[rows]), [torch.stack([log_probs[row] for row in rows])])
        found |= dict(zip(rows, beliefs.max(1).indices, strict=True))
    return [found[row] for row in range(len(images))]
