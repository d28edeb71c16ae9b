"""The detector between objects and segmenter, as MaskDistill (Van Gansbeke et al., 2022) has one: it learns the named
masks of all training pictures and says again, with more certainty, what they hold.

H x W px of what the network sees, n objects of a picture.
"""

from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

import config
from common.spec import IGNORE
from datamodules.base.transforms import Geometry
from lightning_modules.detection.loop import MOST, DetectorLoop, take_weights
from lightning_modules.families.graph_cuts import patch_of, stage_geometry, stage_sides
from models.backbone import Backbone
from models.detection.detector import Detector, targets_of
from pseudo_labels.cache import Record, Records
from pseudo_labels.steps import FitStep, MapStep, Results, new_record, whole_patches
from pseudo_labels.views import Painted, View, confident, first_rows, paint

OF_LOOKING = ("threshold", "least_score", "nms", "most")
"""Settings of a detector that its training does not go by."""


def numbered(objects: Records) -> Painted:
    """`masks` of a picture as one map: each has the number of its row, from 1, where no surer one lies on it."""
    rows = [np.where(np.arange(count) < MOST, np.arange(count), -1) for count in objects.counts("masks")]
    return Painted(objects, np.concatenate(rows), "free_pixels")


def new_detector(cfg: Any, backbone: Backbone) -> Detector:
    """A detector of the classes of objects by `method.detector`."""
    return Detector(backbone.channels, backbone.strides, cfg.method.num_clusters - 1, cfg.method.detector)


class NamedDetector(FitStep):
    """A detector that learns the objects of the training pictures with their clusters; the backbone stays as it is."""

    name, needs = "detector", ("objects", "clusters")

    def __init__(self, cfg: Any, backbone: Backbone) -> None:
        self.cfg, self.backbone = cfg, backbone
        self.steps, self.batch_size = int(cfg.method.detector.steps), int(cfg.data.batch_size)

    def settings(self) -> dict[str, Any]:
        own = {key: value for key, value in config.plain(self.cfg.method.detector).items() if key not in OF_LOOKING}
        own |= {"optim": config.plain(self.cfg.optim.detector), "classes": self.cfg.method.num_clusters - 1}
        return own | {"backbone": self.backbone.features_key}

    def geometry(self) -> Geometry:
        return Geometry.from_config(self.cfg.data, "train")

    def view(self, results: Results) -> View:
        return numbered(results["objects"])

    def module(self, results: Results) -> L.LightningModule:
        return DetectorTraining(self.cfg, self.backbone, results)


class DetectorTraining(DetectorLoop):
    """Training on the objects with their clusters; a picture without any object that was found is passed over."""

    def __init__(self, cfg: Any, backbone: Backbone, results: Results) -> None:
        detector = new_detector(cfg, backbone)
        super().__init__(cfg, detector, backbone, int(cfg.method.detector.steps), trained=False)
        self.classes = torch.from_numpy(np.asarray(results["clusters"]["assignment"], np.int64))
        self.first = first_rows(results["objects"], "masks")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        ids, seed = torch.where(batch["valid"], batch["pseudo"], IGNORE), int(self.cfg.seed)
        targets, keys = [], []
        for own, index in zip(ids, batch["index"].tolist(), strict=True):
            targets.append(targets_of(own, self.classes[self.first[index] :]))
            keys.append((seed, self.global_step, index) if bool((own != IGNORE).any()) else None)
        levels = self.features(batch["image"]).levels
        return sum(self.detector.losses(levels, tuple(ids.shape[-2:]), targets, keys).values())


class Confident(MapStep):
    """What the detector is sure of in every training picture: `segments` [H,W], 0 or the class of the object + 1, and
    `names` of those that are there.

    Detections from `method.detector.threshold` on, or the best where none is; painted by falling score, see
    `method.overlap`. Dropped as `no_object` where nothing was detected. No chance in it.
    """

    name, needs, counted = "confident", ("detector",), "names"

    def __init__(self, cfg: Any, backbone: Backbone) -> None:
        super().__init__(backbone)
        self.cfg, self.detector = cfg, new_detector(cfg, backbone)

    def settings(self) -> dict[str, Any]:
        return {"detector": config.plain(self.cfg.method.detector), "overlap": self.cfg.method.overlap}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg.method.stage, self.cfg.data.interpolation)

    def record_bytes(self) -> int:
        height, width = stage_sides(self.cfg.method.stage, self)
        return int(height * width) * 2 + 1000

    def begin(self, results: Results) -> None:
        take_weights(results["detector"].state(), self.detector, self.backbone)
        self.detector.eval()

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images, own = whole_patches(batch, patch_of(self.backbone)), self.cfg.method
        size, found = tuple(images.shape[-2:]), []
        for row, seen in enumerate(self.detector.detect(self.backbone.features(images).levels, size)):
            masks, scores, classes = (part.cpu().numpy() for part in (seen.masks, seen.scores, seen.classes))
            sure = confident(scores, own.detector.threshold)
            segments = paint(masks[sure], classes[sure], own.overlap).astype(np.int16)
            found.append(new_record(batch, row, images, size, segments=segments, names=np.unique(segments)))
            found[-1].drop = "" if segments.any() else "no_object"
        return found
