"""Objects that are named by clustering and learnt by a segmenter: what COMUS and MaskDistill share."""

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.errors import ConfigError, one_of
from evaluation import readout
from evaluation.instances import Detections
from grouping import masks
from lightning_modules.base.staged import check_stage
from lightning_modules.families.mask_providers import ProvidedMasks, check_masks
from lightning_modules.families.objects import ObjectFinder
from lightning_modules.families.self_training import SelfTrained
from lightning_modules.objects.crops import VECTORS, ObjectVectors
from losses.pseudo_labels import pseudo_label_loss
from pseudo_labels.steps import ReduceStep, Results, Step
from pseudo_labels.views import Certain, Painted, View

log = logging.getLogger(__name__)

SMALLEST = 16
"""Px of a piece of a class that counts as an object."""


class NamedObjects(SelfTrained, ObjectFinder):
    """A base: masks -> vectors -> clusters -> labels -> segmenter.

    A cluster is a class, beside the background; what the segmenter calls no background is read out as val/foreground/*,
    and connected pieces of a class as val/instances/*.
    """

    def build(self) -> None:
        settings = self.cfg.method
        check_stage(settings.stage, self.backbone)
        check_masks(settings, self.backbone)
        one_of("method.objects.vectors", settings.objects.vectors, VECTORS)
        if settings.num_clusters < 2:
            raise ConfigError(
                f"method.num_clusters={settings.num_clusters}: one of them is the background; set 2 or more"
            )
        if settings.objects.size is not None:
            self.backbone.check_size(settings.objects.size, "method.objects.size")
        if settings.objects.vectors == "crop" and not self.backbone.class_token:
            log.info("%s has no trained class token: an object is the mean feature of its crop", self.backbone.name)
        self.build_segmenter()
        self.build_foreground()

    @torch.no_grad()
    def objects(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Where the segmenter sees any object."""
        logits = self.classify(self.embed(self.features(images)))
        found = readout.predict(logits, tuple(images.shape[-2:])) > 0
        return found, torch.stack([masks.tight_box(mask) for mask in found])

    @torch.no_grad()
    def detections(self, images: Tensor, valid: Tensor) -> list[Detections]:
        """Connected pieces of every class but the background, of at least SMALLEST px; how sure a piece is, is the mean
        probability of its class inside."""
        maps = readout.upsample(self.classify(self.embed(self.features(images))).float(), tuple(images.shape[-2:]))
        sure, classes = maps.softmax(1).max(1)
        return [pieces(*parts) for parts in zip(torch.where(valid, classes, 0), sure, strict=True)]

    @property
    def clusters(self) -> int:
        """Classes of objects."""
        return self.cfg.method.num_clusters - 1

    def naming(self) -> ReduceStep:
        """The step `clusters`, whose `assignment` int64 [n] is the cluster of every object, -1 where it is not sure."""
        raise TypeError(f"{type(self).__name__} has to define naming()")

    def first_steps(self, data: Any) -> list[Step]:
        return [ProvidedMasks(self, data.source("train")), ObjectVectors(self.backbone, self.cfg), self.naming()]

    def first_labels(self, results: Results) -> View:
        return Certain(results["objects"], results["clusters"]["assignment"], self.cfg.method.overlap)

    def shown(self, results: Results) -> dict[str, View]:
        if self.round > 1:
            return super().shown(results)
        found = results["masks"]
        numbers = [np.arange(count) for count in found.counts("masks")]
        return {"objects": Painted(found, np.concatenate(numbers))} | super().shown(results)

    def objective(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Cross-entropy, mean over the labelled pixels of the global batch."""
        known = distributed.total((labels != 255).sum().float())
        loss = pseudo_label_loss(logits, labels, known) * distributed.world_size()
        return loss, known, {"cross_entropy": loss.detach()}


def pieces(classes: Tensor, sure: Tensor) -> Detections:
    """Connected pieces (8 neighbours) of the classes int64 [H,W] but 0, with the mean of `sure` [H,W] inside each."""
    found = []
    for name in classes.unique()[classes.unique() > 0].tolist():
        named = masks.components(classes == name, 8)
        sizes = named.flatten().bincount()
        found += [named == piece for piece in range(1, len(sizes)) if sizes[piece] >= SMALLEST]
    if not found:
        nothing = sure.new_zeros(0)
        return Detections(classes.new_zeros(0, *classes.shape).bool(), sure.new_zeros(0, 4), nothing)
    boxes = torch.stack([masks.tight_box(one) for one in found]).float()
    return Detections(torch.stack(found), boxes, torch.stack([sure[one].mean() for one in found]))


def object_rows(results: Results, count: int, device: torch.device) -> Tensor:
    """Vectors float32 [n,D] of all objects. Raises ConfigError where they do not make `count` clusters."""
    rows = torch.from_numpy(results["objects"].rows("features")[0]).to(device)
    if len(rows) < count:
        raise ConfigError(
            f"method.num_clusters: the {len(rows)} objects of the training pictures do not make {count} clusters "
            "beside the background; lower it, method.masks.least or method.objects.min_area, or give more pictures"
        )
    return rows
