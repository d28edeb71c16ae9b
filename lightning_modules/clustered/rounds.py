"""What PiCIE and MDC share: a round of clustering before every epoch, and labels of the network as it was then.

A round makes clusters of the features of each view, one view after the other, with the network in training mode: batch
norms see batches, and their running statistics move, as released. Then the network is copied. The copy, in evaluation
mode, and the centroids label each batch of the epoch as it comes: the views of an epoch are drawn by epoch and picture,
so these are the labels that a pass over all pictures would have written down. Before the end of a run clusters are
fitted once more, on pictures as they are; they are the method's own classes.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import chance, distributed
from common.errors import ConfigError
from common.precision import real
from common.spec import Geometric, Photometric, ViewSpec
from datamodules.base import sampling
from evaluation.readouts import Readout
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.clustered.scored import ClassifierScore
from lightning_modules.families import head_start
from losses import clusters
from losses.clusters import Targets
from models.backbone import Features
from models.fpn import FPN
from retrieval.minibatch import Clusters, MiniBatchKMeans


class ClusterRounds(UnsupervisedSegmenter):
    """Codes = unit vectors of an FPN on the levels of a backbone that is trained with it.

    Class facts: `clustered` (the views that are clustered, in the order of their passes), `fresh_split` (the pictures
    that the final clusters are fitted to where `method.kmeans.fresh` is null).
    """

    trains_backbone = True
    wants_features = False
    headline = "own"
    clustered: tuple[str, ...] = ()
    fresh_split = "train"

    def build(self) -> None:
        settings = self.cfg.method
        self.refuse_padding()
        check_heads(self.head_sizes, settings.num_clusters)
        self.code_dim = settings.dim
        self.head = FPN(self.backbone.channels, self.backbone.strides, settings.dim)
        parts = {"backbone": copy.deepcopy(self.backbone), "head": copy.deepcopy(self.head)}
        self.labeller = nn.ModuleDict(parts).requires_grad_(False).eval()
        views, dim = len(self.clustered), settings.dim
        for number, size in enumerate(self.head_sizes):
            self.register_buffer(f"centroids{number}", torch.zeros(views, size, dim))
            self.register_buffer(f"counts{number}", torch.zeros(views, size, dtype=torch.int64))
        self.register_buffer("round", torch.tensor(-1))
        self.register_buffer("fresh", torch.zeros(settings.num_clusters, dim))
        self.register_buffer("fresh_fitted", torch.tensor(False))

    @property
    def head_sizes(self) -> list[int]:
        """Clusters of each head; the first is read out."""
        return [self.cfg.method.num_clusters]

    def train(self, mode: bool = True) -> "ClusterRounds":
        """As usual, but the copy that labels stays in evaluation mode."""
        super().train(mode)
        self.labeller.eval()
        return self

    @property
    def views(self) -> dict[str, ViewSpec]:
        """`view1`: recoloured, then cropped and mirrored."""
        settings = self.cfg.method.augment
        shape = {"sides": tuple(settings.sides), "flip_p": settings.flip_p, "whole_cells": settings.whole_cells}
        crop = Geometric(size=self.view_size, **shape)
        return {
            "colour1": ViewSpec(photometric=self.recolouring, of_epoch=True),
            "view1": ViewSpec(geometric=crop, source="colour1", of_epoch=True),
        }

    @property
    def view_size(self) -> int | tuple[int, int] | None:
        """Of the views, px; None: that of the training picture."""
        size = self.cfg.method.view_size
        return size if size is None or isinstance(size, int) else tuple(size)

    @property
    def recolouring(self) -> Photometric:
        settings = self.cfg.method.augment
        names = (
            "brightness",
            "contrast",
            "saturation",
            "hue",
            "jitter_p",
            "gray_p",
            "blur_p",
            "blur_kernel",
            "separate",
        )
        return Photometric(**{name: settings[name] for name in names}, blur_sigma=tuple(settings.blur_sigma))

    def param_groups(self) -> list[dict[str, Any]]:
        trained = [part for part in self.backbone.parameters() if part.requires_grad]
        return [{"name": "backbone", "params": trained}, {"name": "head", "params": self.head.parameters()}]

    def embed(self, features: Features) -> Tensor:
        return F.normalize(real(self.head(features.levels)), dim=1)

    # ------------------------------------------------------------------ codes and labels of a view

    def aligned(self, maps: Tensor, views: dict[str, Any], name: str) -> Tensor:
        """Maps [B,D,h,w] of a view in the frame that the views share; `view1` is in it."""
        return maps

    def codes_of(self, views: dict[str, Any], name: str) -> Tensor:
        """Unit codes [B,D,h,w] of a view in the shared frame, by the network that is trained."""
        found = self.backbone.features(views[name], grad=torch.is_grad_enabled())
        return F.normalize(self.aligned(real(self.head(found.levels)), views, name), dim=1)

    @torch.no_grad()
    def labels_of(self, views: dict[str, Any], number: int) -> list[Tensor]:
        """Labels int64 [B,h,w] of view number `number` for each head, by the network and the centroids of the round."""
        name = self.clustered[number]
        maps = real(self.labeller["head"](self.labeller["backbone"].features(views[name]).levels))
        codes = F.normalize(self.aligned(maps, views, name), dim=1)
        heads = range(len(self.head_sizes))
        return [clusters.nearest_centroids(codes, getattr(self, f"centroids{head}")[number]) for head in heads]

    def targets(self, views: dict[str, Any]) -> list[list[Targets]]:
        """Of each head: what the cells of each view are classified into."""
        labels = [self.labels_of(views, number) for number in range(len(self.clustered))]
        mode = self.cfg.method.weights
        found = []
        for head in range(len(self.head_sizes)):
            centroids, counts = getattr(self, f"centroids{head}"), getattr(self, f"counts{head}")
            weights = [clusters.class_weights(own, mode) for own in counts]
            found.append(
                [Targets(*parts) for parts in zip(centroids, (own[head] for own in labels), weights, strict=True)]
            )
        return found

    @torch.no_grad()
    def used(self, targets: Sequence[Targets]) -> Tensor:
        """How many clusters the labels of this step use, exp of their entropy; mean over the views. A collective."""
        sizes = self.head_sizes[0]
        counts = torch.stack([torch.bincount(own.labels.flatten(), minlength=sizes) for own in targets])
        shares = distributed.total(counts.float())
        return torch.special.entr(shares / shares.sum(1, keepdim=True)).sum(1).exp().mean()

    # ------------------------------------------------------------------ a round

    @torch.no_grad()
    def prepare(self, loader: Callable[..., Any]) -> None:
        """The decoder's start, see `method.head_start`; the network reads pictures in training mode, as in a round."""
        if self.cfg.method.head_start == "random":
            return

        def features(batch: dict[str, Any]) -> Tensor:
            return self.backbone.features(batch["image"].to(self.device), grad=False).concat()

        width = sum(self.backbone.channels)
        self.head.begin(*head_start.principal(loader, features, width, self.code_dim, self.device))

    @property
    def epoch_steps(self) -> int:
        return self.cfg.method.every or super().epoch_steps

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.trainer.datamodule.view_steps = self.epoch_steps

    def on_train_start(self) -> None:
        super().on_train_start()
        self.fresh_fitted.fill_(False)  # of a run that is prolonged

    @torch.no_grad()
    def on_epoch(self, loader: Callable[..., Any]) -> None:
        """Clusters of each view, a copy of the network, and the share of each cluster in the labels that it gives."""
        number = self.global_step // self.epoch_steps
        found = [self._clusters(view, number) for view in range(len(self.clustered))]
        for view, heads in enumerate(found):
            for head, made in enumerate(heads):
                getattr(self, f"centroids{head}")[view] = made.centroids
        self.labeller["backbone"].load_state_dict(self.backbone.state_dict())
        self.labeller["head"].load_state_dict(self.head.state_dict())
        self._count()
        self.round.fill_(number)
        self.on_round(number, found)

    def on_round(self, number: int, found: list[list[Clusters]]) -> None:
        """After round `number`; `found`: of each view the clusters of each head."""

    def _clusters(self, view: int, number: int) -> list[Clusters]:
        """The clusters of one view for each head: a pass in training mode."""
        settings, name, data = self.cfg.method.kmeans, self.clustered[view], self.trainer.datamodule
        purpose, pictures = (
            f"{self.cfg.method.name}.kmeans",
            min(settings.pictures or data.train_items, data.train_items),
        )
        batches = data.shown(
            self.global_step, [name, *self.needed(name)], settings.batch_size, purpose, self.device, settings.pictures
        )
        key = chance.key(self.cfg.seed, f"{purpose}.start", number, view)
        return self._fitted(batches, lambda batch: self.codes_of(batch, name), self.head_sizes, pictures, key)

    def needed(self, name: str) -> Sequence[str]:
        """Further views whose geometry `aligned` wants for a view."""
        return ()

    def _fitted(
        self,
        batches: Iterable[dict[str, Any]],
        read: Callable[[dict[str, Any]], Tensor],
        sizes: Sequence[int],
        pictures: int,
        key: int,
    ) -> list[Clusters]:
        """Mini-batch k-means of the unit codes [B,D,h,w] that `read` gives of batches, for each number of clusters; the
        same cells of every picture, so that there are at most `method.kmeans.points` in the first fit. In training
        mode."""
        settings = self.cfg.method.kmeans
        start = {"first": settings.first, "group": settings.group, "iterations": settings.iterations}
        made = [MiniBatchKMeans(k, **start, init=settings.init, seed=key) for k in sizes]
        share = max(1, settings.points // min(pictures, settings.first * settings.batch_size))
        cells, mode = None, self.training
        self.train()
        for batch in batches:
            with self.trainer.precision_plugin.forward_context():
                rows = read(batch).flatten(2).mT
            if cells is None and rows.shape[1] > share:
                drawn = torch.randperm(rows.shape[1], generator=chance.generator(key, "cells"))
                cells = drawn[:share].sort().values.to(rows.device)
            rows = rows if cells is None else rows[:, cells]
            for kmeans in made:
                kmeans.add(rows.flatten(0, 1))
        self.train(mode)
        return [kmeans.finish() for kmeans in made]

    def _count(self) -> None:
        """How many cells get each label, in all pictures or in `method.kmeans.counted` of them."""
        heads = range(len(self.head_sizes))
        for head in heads:
            getattr(self, f"counts{head}").zero_()
        if self.cfg.method.weights not in ("proportional", "inverse"):
            return
        settings, data = self.cfg.method.kmeans, self.trainer.datamodule
        wanted = list(dict.fromkeys(name for view in self.clustered for name in (view, *self.needed(view))))
        purpose, size = f"{self.cfg.method.name}.count", settings.batch_size
        for batch in data.shown(self.global_step, wanted, size, purpose, self.device, settings.counted):
            for view in range(len(self.clustered)):
                with self.trainer.precision_plugin.forward_context():
                    found = self.labels_of(batch, view)
                for head, labels in enumerate(found):
                    counts = getattr(self, f"counts{head}")
                    counts[view] += torch.bincount(labels.flatten(), minlength=counts.shape[1])
        for head in heads:
            counts = getattr(self, f"counts{head}")
            counts.copy_(distributed.total(counts))

    # ------------------------------------------------------------------ classes of its own

    @property
    def own_fitted(self) -> bool:
        return bool(self.fresh_fitted)

    @torch.no_grad()
    def fit_own(self) -> None:
        """Clusters of pictures as they are, by a pass in training mode, which moves the running statistics, as
        released."""
        settings, data = self.cfg.method.kmeans, self.trainer.datamodule
        split = settings.fresh or self.fresh_split
        count, purpose = len(data.source(split)), f"{self.cfg.method.name}.fresh"
        order = sampling.permutation(count, self.cfg.seed, f"{purpose}.order", 0)[: settings.pictures]
        batches = data.in_step(split, data.eval_geometry, [(0, int(i)) for i in order], settings.batch_size, purpose)
        key = chance.key(self.cfg.seed, f"{purpose}.start")

        def read(batch: dict[str, Any]) -> Tensor:
            return self.embed(self.features(batch["image"].to(self.device)))

        (found,) = self._fitted(batches, read, [self.cfg.method.num_clusters], len(order), key)
        self.fresh.copy_(found.centroids)
        self.fresh_fitted.fill_(True)

    def classify(self, codes: Tensor) -> Tensor:
        """Logits of the final clusters; before they are fitted, of the classifier that is trained with (view 1)."""
        if self.own_fitted:
            return clusters.logits(codes, self.fresh)
        return self.classifier_logits(codes, 0)

    def classifier_logits(self, codes: Tensor, view: int) -> Tensor:
        """Of the classifier that view number `view` is trained with: [B,D,h,w] -> [B,K,h,w]."""
        return clusters.logits(codes, self.centroids0[view])

    @property
    def readouts(self) -> list[Readout]:
        """The classifiers of training, whose scores stand beside those of the final clusters."""
        rules, sizes = self.cfg.evaluation, (self.cfg.method.num_clusters, self.meta.num_classes)
        policy = {
            "matching": rules.matching,
            "extra": rules.extra,
            "absent": rules.absent,
            "background": rules.background,
        }
        names = enumerate(self.classifier_names) if self.meta.has_labels else ()
        return [ClassifierScore(name, view, *sizes, **policy) for view, name in names]

    @property
    def classifier_names(self) -> Sequence[str]:
        return self.clustered

    def offline_state(self) -> dict[str, Tensor]:
        """With the final clusters go the running statistics that their pass has moved."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith("fresh")}
        statistics = {f"backbone.{name}": value for name, value in self.backbone.named_buffers()}
        kept = {name: value for name, value in statistics.items() if name in self.state_dict()}
        return super().offline_state() | own | kept


def check_heads(sizes: Sequence[int], clusters: int) -> None:
    """Raises ConfigError where the first head is not what is read out."""
    if sizes[0] != clusters:
        raise ConfigError(
            f"method.heads={list(sizes)}: the first head is read out, so it must have method.num_clusters={clusters} "
            f"clusters; set method.heads={[clusters, *sizes[1:]]}"
        )
