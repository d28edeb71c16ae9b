"""How a detector learns from maps of objects: one batch, and a whole round inside an offline stage.

B pictures of H x W px; a map of objects holds 0 nothing, 255 not known, other values one object each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

import config
from common.spec import IGNORE, Geometric, Photometric, ViewSpec
from datamodules.base import views as pictures
from datamodules.base.transforms import Geometry
from lightning_modules.detection.copy_paste import copy_paste
from lightning_modules.detection.loop import MOST, DetectorLoop
from lightning_modules.families.segmenter import COLOURS
from models.backbone import Backbone
from models.detection.detector import Detector, targets_of
from models.detection.merging import paint
from pseudo_labels.cache import Record, Records
from pseudo_labels.steps import FitStep, Results
from pseudo_labels.views import View

VIEW = "augmented"
"""Name of the view that a detector learns on."""


@dataclass(frozen=True)
class Round:
    """What differs between the first training, on found masks, and those on its own detections (`method.rounds`)."""

    drop: float | None
    paste: tuple[float, float] | None
    proposals: int
    proposal_nms: float
    lr: float
    """Times `optim.<group>.lr`."""

    @classmethod
    def of(cls, method: Any, number: int) -> "Round":
        """Of training number `number`, from 0."""
        own, again = method.detector, method.rounds
        if not number:
            return cls(own.drop, pair(method.paste), own.proposals, own.proposal_nms, 1.0)
        return cls(again.drop, pair(again.paste), again.proposals, again.proposal_nms, again.lr)

    def set(self, detector: Detector) -> None:
        """Put it into a detector."""
        detector.heads.drop = self.drop
        detector.proposals._post_nms_top_n["training"] = self.proposals
        detector.proposals.nms_thresh = self.proposal_nms


def pair(values: Sequence[float] | None) -> tuple[float, float] | None:
    return None if values is None else (float(values[0]), float(values[1]))


class Objects(View):
    """`masks` of a picture as one map: each has an id from 1, by falling `scores`; where two overlap the surer one is
    seen. Of more than 254 masks the surest."""

    def __init__(self, records: Records) -> None:
        super().__init__(records, ("masks", "scores"))

    def labels(self, record: Record) -> np.ndarray:
        masks, scores = (torch.from_numpy(record.fields[name]) for name in self.fields)
        best = scores.argsort(descending=True, stable=True)[:MOST]
        return paint(masks[best], scores[best]).numpy()


def view_of(augment: Any) -> ViewSpec:
    """A part of the picture in other colours, mirrored now and then (`method.augment`)."""
    colour = Photometric(**{name: augment[name] for name in COLOURS})
    return ViewSpec(colour, Geometric(scale=tuple(augment.scale), flip_p=0.5))


def batch_losses(
    detector: Detector, features: Callable[[Tensor], Any], views: dict[str, Any], seed: int, step: int, own: Round
) -> dict[str, Tensor]:
    """The detector's losses on a batch with the view and its map of objects; a picture without any is passed over."""
    keys = [(seed, step, index) for index in views["index"].tolist()]
    ids = torch.where(views[f"{VIEW}.valid"], views[f"{VIEW}.pseudo"], IGNORE)
    images, ids = copy_paste(views[VIEW], ids, keys, own.paste)
    known = (ids != IGNORE).flatten(1).any(1).tolist()
    targets = [targets_of(one) for one in ids]
    drawn = [key if labelled else None for key, labelled in zip(keys, known, strict=True)]
    return detector.losses(features(images).levels, tuple(ids.shape[-2:]), targets, drawn)


def make_detector(cfg: DictConfig, backbone: Backbone) -> Detector:
    """A new class-agnostic detector by `method.detector`."""
    return Detector(backbone.channels, backbone.strides, 1, cfg.method.detector)


class DetectorRound(FitStep):
    """A detector trained on the masks of an earlier step; its weights, and those of the backbone where it is trained,
    as `detector.*` and `backbone.*`."""

    def __init__(self, cfg: DictConfig, backbone: Backbone, number: int, needs: Sequence[str]) -> None:
        """needs: the step of the masks, and for a later round the one whose weights it goes on with."""
        self.cfg, self.backbone, self.number = cfg, backbone, number
        self.name, self.needs = f"detector_{number}", tuple(needs)
        self.steps = int(cfg.method.rounds.steps or cfg.trainer.max_steps)
        self.batch_size = int(cfg.data.batch_size)

    def settings(self) -> dict[str, Any]:
        own = config.plain(self.cfg.method)
        kept = {key: own[key] for key in ("detector", "paste", "rounds", "augment")}
        kept["rounds"] = {key: value for key, value in kept["rounds"].items() if key != "sure"}
        trained = {} if self.backbone.frozen else {"backbone": config.plain(self.cfg.optim.backbone)}
        optim = {"detector": config.plain(self.cfg.optim.detector), **trained}
        return kept | {"number": self.number, "optim": optim, "backbone": self.backbone.features_key}

    def geometry(self) -> Geometry:
        return Geometry.from_config(self.cfg.data, "train")

    def view(self, results: Results) -> View:
        return Objects(results[self.needs[0]])

    def module(self, results: Results) -> L.LightningModule:
        found = DetectorTraining(self.cfg, self.backbone, self.number, self.steps)
        if len(self.needs) > 1:
            found.load_state_dict(results[self.needs[1]].state())
        return found


class DetectorTraining(DetectorLoop):
    """A round of training on views of the pictures, see `batch_losses`."""

    def __init__(self, cfg: DictConfig, backbone: Backbone, number: int, steps: int) -> None:
        own = Round.of(cfg.method, number)
        detector = make_detector(cfg, backbone)
        super().__init__(cfg, detector, backbone, steps, rate=own.lr, trained=not backbone.frozen)
        self.round = own
        own.set(detector)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        seed = int(self.cfg.seed)
        views = pictures.make_views(batch, {VIEW: view_of(self.cfg.method.augment)}, seed, self.global_step)
        return sum(batch_losses(self.detector, self.features, views, seed, self.global_step, self.round).values())
