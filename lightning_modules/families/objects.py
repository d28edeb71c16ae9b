"""Methods that find one object in each picture: the read-out `val/foreground/*`, and a step that keeps masks."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from datamodules.base.transforms import Geometry
from evaluation.foreground import ForegroundScore, object_classes
from evaluation.instances import Detections, InstanceScore
from evaluation.readouts import Readout
from lightning_modules.base.extents import own_extents
from lightning_modules.base.staged import StagedSegmenter
from lightning_modules.families.graph_cuts import patch_of, stage_cells, stage_geometry
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, new_record, whole_patches
from reporting import report

log = logging.getLogger(__name__)

OF_NO_MASK = ("stage", "foreground", "num_clusters")
"""Groups and keys of a method that its masks do not depend on."""


class ObjectFinder(StagedSegmenter):
    """A base: `objects(images)` finds; `finds_objects` says whether this run is read out by it.

    Labels are looked at in validation alone, to score: `method.foreground` names the classes that count as objects.
    """

    finds_objects = True
    newest: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    """The newest pictures and what `objects_inside` found in them: two scores ask for it."""

    @property
    def readouts(self) -> list[Readout]:
        return [*super().readouts, InstanceScore()] if self.finds_objects else super().readouts

    def objects(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Masks bool [B,h,w] over the pictures [B,3,H,W], and boxes int64 [B,4] in px of them."""
        raise TypeError(f"{type(self).__name__} has to define objects()")

    def objects_inside(self, images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Masks bool [B,H,W] and boxes int64 [B,4] of pictures that are padded where `valid` bool [B,H,W] is false.

        Each is cut without the padding of the batch; those of one size together.
        """
        if self.newest is None or self.newest[0] is not images:
            self.newest = images, self._objects_inside(images, valid)
        return self.newest[1]

    def detections(self, images: Tensor, valid: Tensor) -> list[Detections]:
        """The object of each picture, where there is one, as an instance that is sure."""
        found = []
        for mask, box in zip(*self.objects_inside(images, valid), strict=True):
            rows = slice(0, int(mask.any()))
            found.append(Detections(mask[None][rows], box[None][rows].float(), images.new_ones(1)[rows]))
        return found

    def _objects_inside(self, images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        masks, found = torch.zeros_like(valid), {}
        for extent in own_extents(valid, self.backbone.patch_multiple):
            (height, width), rows = extent.valid, list(extent.rows)
            own, boxes = self.objects(extent.cut(images))
            own = F.interpolate(own[:, None].float(), size=extent.seen, mode="nearest")[:, 0] > 0.5
            masks[rows, :height, :width] = own[:, :height, :width]
            boxes = torch.minimum(boxes, boxes.new_tensor([width, height, width, height]))
            found |= dict(zip(rows, boxes, strict=True))
        return masks, torch.stack([found[row] for row in range(len(images))])

    def build_foreground(self) -> None:
        """For `build`: the score, where labels say what an object is. Raises ConfigError for a class that is none."""
        chosen = list(self.cfg.method.foreground)
        if self.meta.has_labels and any(not 0 <= i < self.meta.num_classes for i in chosen):
            raise ConfigError(
                f"method.foreground={chosen}: the data has classes 0 to {self.meta.num_classes - 1}; name some of them"
            )
        classes = object_classes(self.meta, chosen) if self.meta.has_labels else ()
        self.foreground = ForegroundScore(classes) if classes and self.finds_objects else None
        self.told = False

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        maps = super().validation_step(batch, batch_idx)
        if self.foreground is not None and "label" in batch:
            self.foreground.update(*self.objects_inside(batch["image"], batch["valid"]), batch["label"])
        return maps

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        if self.foreground is not None:
            self.foreground.reset()
        elif self.finds_objects and self.meta.has_labels and not self.told:
            self.told = True
            log.warning(
                "method.foreground=[]: nothing says which classes are objects, so val/foreground is not scored; "
                "name their ids"
            )

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.foreground is not None:
            values = report.flatten("val", "foreground", self.foreground.compute())
            known = {name: value for name, value in values.items() if value is not None}
            self.log_dict(known, rank_zero_only=True)


class ObjectMasks(MapStep):
    """The object of every training picture: `masks` bool [1,h,w], `boxes` float32 [1,4] (px of the file), `scores` [1].

    Dropped as `no_object` where the mask is empty. A saliency source for others (`views.Saliency`).
    """

    name, counted = "masks", "masks"

    def __init__(self, method: ObjectFinder) -> None:
        super().__init__(method.backbone)
        self.cfg = method.cfg
        self.find = method.objects

    def settings(self) -> dict[str, Any]:
        own = {key: value for key, value in self.cfg.method.items() if key not in OF_NO_MASK}
        return {key: dict(value) if hasattr(value, "items") else value for key, value in own.items()}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg.method.stage, self.cfg.data.interpolation)

    def record_bytes(self) -> int:
        return stage_cells(self.cfg.method.stage, self) // 8 + 1000

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = whole_patches(batch, patch_of(self.backbone))
        masks, boxes = self.find(images)
        found = []
        for row, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
            rows, columns = (int(batch["valid"][row].any(axis).sum()) for axis in (1, 0))
            height, width = batch["size"][row].tolist()
            scale = torch.tensor([width / columns, height / rows] * 2, device=box.device)
            fields = {"masks": mask[None], "boxes": (box * scale).float()[None], "scores": torch.ones(1)}
            found.append(new_record(batch, row, images, tuple(mask.shape), **fields))
            found[-1].drop = "" if bool(mask.any()) else "no_object"
        return found
