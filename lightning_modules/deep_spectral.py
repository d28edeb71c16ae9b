"""Deep Spectral Methods (Melas-Kyriazi et al., CVPR 2022): classes of regions that eigenvectors of a patch graph give.

Offline: the graph of a picture's attention keys, its first eigenvectors, k-means in them to segments, k-means of the
features of all segments to classes, painted as pseudo-labels. Then a DeepLab head learns these (self-training). Scored
as val/own/*. `method.self_training=false`: the classes of the regions themselves. `method.segments.mode=single`: object
and background, also read out as val/foreground/*. Code: lukemelas/deep-spectral-segmentation.

Here, and not as released: clusters are counted from 1 beside the background (released: cluster 0 falls together with
it), starts of k-means are keyed, labels are found by name, and clusters are matched anew in every validation.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.spec import IGNORE, ViewSpec
from datamodules.base import SegmentationDataModule
from grouping import spectral
from lightning_modules.base import Loss
from lightning_modules.families.cut_regions import RegionSegmenter
from lightning_modules.families.graph_cuts import graph_vectors
from lightning_modules.families.objects import ObjectFinder
from lightning_modules.families.segmenter import augmented, labels_of, trained_groups
from losses.pseudo_labels import pseudo_label_loss
from models.backbone import Features
from models.deeplab import DeepLabHead
from pseudo_labels.steps import Results


class DeepSpectral(RegionSegmenter, ObjectFinder):
    """Codes = what the head's classifier reads; without self-training, the L2-normalised features."""

    title = "Deep Spectral"
    trains_backbone = None
    wants_features = False
    exports = "the backbone after self-training"

    @property
    def trains(self) -> bool:
        return bool(self.cfg.method.self_training)

    @property
    def reads_regions(self) -> bool:
        return not self.trains

    @property
    def finds_objects(self) -> bool:
        return self.cfg.method.segments.mode == "single"

    def build(self) -> None:
        settings = self.cfg.method
        self.wants_features = not self.trains
        if not self.trains and not self.backbone.frozen:
            raise ConfigError(
                "backbone.frozen=false: nothing trains it without self-training; set backbone.frozen=true, or "
                "method.self_training=true"
            )
        if self.finds_objects and not settings.background:
            raise ConfigError(
                "method.background=false: with method.segments.mode=single it is one of two; set it to true"
            )
        self.build_regions()
        self.build_foreground()
        self.head = None
        self.code_dim = self.backbone.dim
        if self.trains:
            self.head = DeepLabHead(self.backbone.channels, settings.num_clusters, **settings.head)
            self.code_dim = settings.head.hidden

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        super().staged(results, data)
        if self.trains:
            data.pseudo = self.labels(results)

    @property
    def views(self) -> dict[str, ViewSpec]:
        """A crop of every picture in other colours, which the head learns on."""
        if not self.trains:
            return {}
        return augmented(self.cfg.method.augment)

    def param_groups(self) -> list[dict[str, Any]]:
        return trained_groups(self.head, self.backbone)

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1) if self.head is None else self.head(features.levels)

    def scores(self, features: Features) -> Tensor:
        """Logits of the head, or the classes of regions, [B,K,h,w]."""
        return super().scores(features) if self.head is None else self.head.classify(self.embed(features))

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Self-training: cross-entropy on every pixel that has a pseudo-label."""
        codes = self.embed(self.features(views["augmented"]))
        labels = labels_of(views)
        known = distributed.total((labels != IGNORE).sum().float())
        world = distributed.world_size()
        loss = pseudo_label_loss(self.head.classify(codes), labels, known) * world
        share = known / (labels.numel() * world)
        parts = {"cross_entropy": loss.detach(), "labelled": share}
        return Loss(loss, parts, skip=known == 0, codes=codes, view="augmented")

    @torch.no_grad()
    def objects(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Localisation: the largest component of the second eigenvector's object side, and its box."""
        settings = self.cfg.method
        found, size = graph_vectors(self.backbone, images, self.kind, settings.graph, settings.eigs)
        maps = found.vectors[:, 1].unflatten(1, size)
        cells = torch.stack([spectral.localise(vector, 1, size)[1] for vector in maps])
        height, width = (side / count for side, count in zip(images.shape[-2:], size, strict=True))
        boxes = (cells * cells.new_tensor([width, height, width, height], dtype=torch.float64)).round().long()
        return torch.stack([spectral.foreground(vector) for vector in maps]), boxes
