"""CutLER (Wang et al., CVPR 2023): a detector that learns from MaskCut's masks, then from its own sure detections.

Offline: the masks of the training pictures (`method.masks`, MaskCut as released); for every round of self-training a
detector is trained on the masks so far and looks at the pictures again. Training is that of the last detector. The
first learns with DropLoss: a box far from every mask is not taught to be background. Scored as val/instances/*. Its
semantic classes, val/own/*, follow U2Seg (CVPR 2024): features of detected objects in clusters, painted on a
background. Code: facebookresearch/CutLER.

Here, and not as released: DropLoss goes by all objects of a picture; boxes follow from masks; where two objects of a
picture overlap the surer one has the pixels; losses are means over the boxes of all devices; Mask R-CNN is the default,
the cascade an option.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.spec import ViewSpec
from datamodules.base import SegmentationDataModule
from evaluation.instances import Detections, InstanceScore
from evaluation.readouts import Readout
from lightning_modules.base import Loss
from lightning_modules.base.staged import StagedSegmenter, check_stage
from lightning_modules.detection.loop import take_weights
from lightning_modules.detection.relabel import Relabelled, resized
from lightning_modules.detection.training import (
    VIEW,
    DetectorRound,
    Objects,
    Round,
    batch_losses,
    make_detector,
    view_of,
)
from lightning_modules.families.mask_providers import ProvidedMasks, check_masks
from models.backbone import Features
from models.detection.detector import Found
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import View
from retrieval import kmeans


class CutLER(StagedSegmenter):
    """Codes = L2-normalised backbone features; objects are detected beside them."""

    title = "CutLER"
    headline = "instances"
    trains_backbone = None
    wants_features = False
    exports = "the backbone that the detector was trained with"

    def build(self) -> None:
        settings = self.cfg.method
        check_stage(settings.stage, self.backbone)
        check_masks(settings, self.backbone)
        self.refuse_padding()
        if settings.num_clusters < 2:
            raise ConfigError(
                f"method.num_clusters={settings.num_clusters}: the background is one of them; use 2 or more"
            )
        self.code_dim = self.backbone.dim
        self.rounds = len(settings.rounds.sure)
        self.detector = make_detector(self.cfg, self.backbone)
        self.round = Round.of(settings, self.rounds)
        self.round.set(self.detector)
        self.register_buffer("centroids_own", torch.zeros(settings.num_clusters - 1, self.backbone.dim))
        self.register_buffer("own_ready", torch.tensor(False))
        self.newest: list[Found] | None = None

    # ------------------------------------------------------------------ the stage

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        """Masks; for every round a detector on them, and what it finds."""
        found: list[Step] = [ProvidedMasks(self, data.source("train"), "masks_0")]
        for number in range(self.rounds):
            before = [f"masks_{number}", *([f"detector_{number - 1}"] if number else [])]
            found.append(DetectorRound(self.cfg, self.backbone, number, before))
            found.append(Relabelled(self.cfg, self.backbone, number + 1, [f"masks_{number}", f"detector_{number}"]))
        return found

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        data.pseudo = Objects(results[f"masks_{self.rounds}"])
        if not self.rounds:
            return
        state = results[f"detector_{self.rounds - 1}"].state()  # a resumed run has its own weights put in afterwards
        take_weights(state, self.detector, self.backbone)

    def shown(self, results: Results) -> dict[str, View]:
        return {f"objects {number}": Objects(results[f"masks_{number}"]) for number in range(self.rounds + 1)}

    # ------------------------------------------------------------------ training

    @property
    def views(self) -> dict[str, ViewSpec]:
        return {VIEW: view_of(self.cfg.method.augment)}

    def param_groups(self) -> list[dict[str, Any]]:
        rate = {name: {"lr": self.round.lr * self.cfg.optim[name].lr} for name in ("detector", "backbone")}
        groups = [{"name": "detector", "params": self.detector.parameters(), **rate["detector"]}]
        if not self.backbone.frozen:
            trained = [value for value in self.backbone.parameters() if value.requires_grad]
            groups.append({"name": "backbone", "params": trained, **rate["backbone"]})
        return groups

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1)

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        losses = batch_losses(self.detector, self.features, views, int(self.cfg.seed), self.global_step, self.round)
        parts = {name: value.detach() for name, value in losses.items()}
        return Loss(sum(losses.values()), parts, codes=self._codes(self.features_of(views)))

    # ------------------------------------------------------------------ objects

    @property
    def sure(self) -> float:
        return float(self.cfg.method.semantic.sure)

    @property
    def readouts(self) -> list[Readout]:
        return [*super().readouts, InstanceScore()]

    def detections(self, images: Tensor, valid: Tensor) -> list[Detections]:
        """The objects of pictures [B,3,H,W], of which `valid` bool [B,H,W] is no padding."""
        newest, self.newest = self.newest, None
        whole = bool(valid.all())
        if newest is None or not whole or len(newest) != len(images) or newest[0].masks.shape[1:] != valid.shape[1:]:
            sides = [(int(part.any(1).sum()), int(part.any(0).sum())) for part in valid]
            newest = self.detector.detect(self.features(images).levels, tuple(valid.shape[1:]), sides)
        return [Detections(one.masks, one.boxes, one.scores) for one in newest]

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        self.newest = None
        return super().validation_step(batch, batch_idx)

    # ------------------------------------------------------------------ classes of its own

    @property
    def own_fitted(self) -> bool:
        return bool(self.own_ready)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.own_ready.fill_(False)  # of a run that is prolonged

    @torch.no_grad()
    def fit_own(self) -> None:
        """Clusters of the unit mean features of sure objects, of the training pictures as they are evaluated."""
        settings, mode = self.cfg.method.semantic, self.training
        self.eval()
        found = [self.centroids_own[:0]]
        for batch in self.unlabelled_loader("train", limit=settings.pictures, purpose="cutler.semantic"):
            features = self.features(batch["image"].to(self.device))
            for number, one in enumerate(self._found(features)):
                found.append(described(features.concat()[number], one.masks[one.scores >= self.sure]))
        self.train(mode)
        vectors = distributed.gather_uneven(torch.cat(found))
        count = min(len(self.centroids_own), len(vectors))
        self.centroids_own.zero_()
        if count:
            made = kmeans.fit(vectors, count, spherical=True, seed=int(self.cfg.seed), iterations=100)
            self.centroids_own[:count] = made.centroids.to(self.centroids_own)
        self.own_ready.fill_(True)

    def offline_state(self) -> dict[str, Tensor]:
        return super().offline_state() | {"centroids_own": self.centroids_own, "own_ready": self.own_ready}

    def _found(self, features: Features) -> list[Found]:
        """Objects of pictures by their features; the finest level tells how large they are."""
        level = min(range(len(self.backbone.strides)), key=lambda number: self.backbone.strides[number])
        size = tuple(side * self.backbone.strides[level] for side in features.levels[level].shape[-2:])
        return self.detector.detect(features.levels, size)

    def scores(self, features: Features) -> Tensor:
        """[B,K,h,w]: 1 where a class is. Class 0 is the background, on it the classes of sure objects, the surest on
        top; before they are fitted each object is of class 1."""
        self.newest = self._found(features)
        grid = tuple(2 * side for side in features.concat().shape[-2:])
        maps = []
        for number, one in enumerate(self.newest):
            chosen = one.scores >= self.sure
            masks = resized(one.masks[chosen], grid)
            vectors = described(features.concat()[number], one.masks[chosen])
            classes = 1 + (vectors @ self.centroids_own.T).argmax(1)
            painted = torch.zeros(grid, dtype=torch.int64, device=self.device)
            for mask, name in zip(masks.flip(0), classes.flip(0), strict=True):
                painted[mask] = name
            maps.append(F.one_hot(painted, self.cfg.method.num_clusters).permute(2, 0, 1).float())
        return torch.stack(maps)


def described(maps: Tensor, masks: Tensor) -> Tensor:
    """Unit vectors [n,D] of objects: the mean of the unit features [D,h,w] of a picture inside masks bool [n,H,W]."""
    inside = F.interpolate(masks[:, None].float(), maps.shape[-2:], mode="area")[:, 0] if len(masks) else masks.float()
    unit = F.normalize(maps, dim=0).flatten(1)
    return F.normalize(inside.flatten(1) @ unit.T, dim=1) if len(masks) else unit.new_zeros(0, len(maps))
