"""Objects of training pictures, found once and kept: one interface for files, attention and graph cuts.

A method with the keys `method.masks.*` and `method.stage.*` calls `check_masks` in `build` and puts `ProvidedMasks`
first into its steps. A further way to find objects is one class (`mask_finders.py` has the others) and its entry in
`PROVIDERS`; its settings go through `method.masks.options`, so no yaml changes for it.

h x w cells of a mask, n masks of a picture.
"""

import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import one_of
from datamodules.base.transforms import Geometry
from grouping import masks as shapes
from lightning_modules.families.graph_cuts import patch_of, stage_cells, stage_geometry, stage_sides
from lightning_modules.families.mask_crf import filled
from lightning_modules.families.mask_finders import (
    ClassAttention,
    FolderMasks,
    MaskCutMasks,
    MaskProvider,
    SpectralMasks,
    TokenCutMasks,
)
from models.backbone import Backbone
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, new_record, whole_patches

log = logging.getLogger(__name__)

AROUND = 8
"""Neighbours of a place in a component, and so in a contour as OpenCV draws it."""

PROVIDERS: dict[str, type[MaskProvider]] = {
    "folder": FolderMasks,
    "attention": ClassAttention,
    "token_cut": TokenCutMasks,
    "mask_cut": MaskCutMasks,
    "spectral": SpectralMasks,
}
"""By the names of `method.masks.provider`."""
OBJECTS = ("union", "best", "each", "components")
"""Of what was found in a picture: all of it as one mask, the best mask alone, each mask, or each connected piece."""


def mask_provider(masks: Any, backbone: Backbone, source: Any = None) -> MaskProvider:
    """The provider that `masks` (`method.masks`) names; `source`: the training pictures, for a folder.

    Attention of a network that has none, or whose class token was not trained, gives way to the spectral foreground,
    and the remark says so. Raises ConfigError for settings that cannot be.
    """
    one_of("method.masks.provider", masks.provider, PROVIDERS)
    kind = PROVIDERS[masks.provider]
    if kind is FolderMasks:
        return FolderMasks(backbone, masks, source)
    found = kind(backbone, masks)
    if kind is ClassAttention and not (backbone.has_attention and backbone.class_token):
        lacking = "no trained class token" if backbone.has_attention else "no attention"
        found = SpectralMasks(backbone, SimpleNamespace(provider="spectral", options={}))
        found.remark = (
            f"method.masks.provider=attention: {backbone.name} has {lacking}; masks are the spectral foreground of its "
            "features (method.masks.provider=spectral)"
        )
    return found


def check_masks(method: Any, backbone: Backbone) -> None:
    """For `build`: logs what the run has to say of its provider. Raises ConfigError for values of `method.masks` that
    cannot be, before a picture is read."""
    one_of("method.masks.objects", method.masks.objects, OBJECTS)
    remark = mask_provider(method.masks, backbone).remark
    if remark:
        log.info("%s", remark)


class ProvidedMasks(MapStep):
    """The objects of every training picture: `masks` bool [n,h,w], `boxes` float32 [n,4] (px of the file) and
    `scores` float32 [n], the best first.

    Dropped as `no_object` where nothing was found, as `too_small` where all that was found is below
    `method.masks.least`; by a folder as `no_file`, `wrong_size`, `unreadable`, `whole_picture`. No chance in it.
    """

    counted = "masks"

    def __init__(self, method: Any, source: Any, name: str = "masks") -> None:
        """method: a StagedSegmenter; source: its training pictures (`data.source("train")`)."""
        provider = mask_provider(method.cfg.method.masks, method.backbone, source)
        super().__init__(method.backbone if provider.sees else None)
        self.name, self.provider, self.method = name, provider, method.cfg.method
        self.interpolation = method.cfg.data.interpolation

    def settings(self) -> dict[str, Any]:
        own = {key: self.method.masks[key] for key in ("objects", "least", "fill")}
        return own | {"provider": self.provider.identity()}

    def geometry(self) -> Geometry:
        return stage_geometry(self.method.stage, self.interpolation)

    def record_bytes(self) -> int:
        if not self.provider.pixels:
            return stage_cells(self.method.stage, self) + 1000
        height, width = stage_sides(self.method.stage, self)
        return int(height * width) // 4 + 1000

    def announce(self, count: int) -> str:
        return self.provider.announce()

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = whole_patches(batch, patch_of(self.backbone) if self.provider.sees else 1)
        own, found = self.method.masks, []
        for row, seen in enumerate(self.provider.find(images, batch)):
            masks, scores = refined(seen.masks, seen.scores, own.objects, own.least, own.fill)
            grid = tuple(masks.shape[-2:])
            record = new_record(batch, row, images, grid, masks=masks, scores=scores)
            sides = [side * part / cells for side, part, cells in zip(record.size, record.extent, grid, strict=True)]
            boxes = [shapes.tight_box(mask).cpu().numpy() * np.array([sides[1], sides[0]] * 2) for mask in masks]
            record.fields["boxes"] = np.array(boxes, np.float32).reshape(-1, 4)
            if not len(masks):
                record.drop = seen.drop or ("too_small" if bool(seen.masks.any()) else "no_object")
            found.append(record)
        return found


def refined(masks: Tensor, scores: Tensor, objects: str, least: float, fill: bool) -> tuple[Tensor, Tensor]:
    """What is kept of the masks bool [n,h,w] of a picture with scores [n]: masks [m,h,w] and scores [m], best first.

    objects: see OBJECTS; pieces have the score of their mask times their share of its area, and of the best mask the
    first of equals counts. Holes are filled with `fill`; pieces of less than `least` of the picture are left out, and
    so is a mask that is less. The area rule is that of MaskContrast (ICCV 2021), which has 0.01 and contours filled.
    """
    if objects == "union" and len(masks):
        masks, scores = masks.any(0)[None], scores.max()[None]
    elif objects == "best" and len(masks):
        best = scores.argmax()
        masks, scores = masks[best][None], scores[best][None]
    kept, values, cells = [], [], masks.shape[-2] * masks.shape[-1]
    for mask, score in zip(masks, scores, strict=True):
        pieces = shapes.components(filled(mask) if fill else mask, AROUND)
        sizes = pieces.flatten().bincount()
        large = (sizes >= least * cells) & (sizes > 0)
        large[0] = False
        if not bool(large.any()):
            continue
        if objects != "components":
            kept.append(large[pieces])
            values.append(score)
            continue
        for name in large.nonzero()[:, 0]:
            kept.append(pieces == name)
            values.append(score * sizes[name] / sizes[1:].sum())
    if not kept:
        return masks[:0], scores[:0]
    order = torch.stack(values).argsort(descending=True, stable=True)
    return torch.stack(kept)[order], torch.stack(values)[order]
