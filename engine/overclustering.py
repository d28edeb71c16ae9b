"""What `evaluation.overcluster`, `cbfe` and `communities` need before an evaluation: how codes are reduced, noisy
foregrounds, and the training pictures that take part."""

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from common import distributed
from common.errors import ConfigError
from datamodules.base import SegmentationDataModule
from engine.callbacks.screen import counted
from evaluation import readout
from evaluation.overclustering import masks, pictures
from evaluation.overclustering.readout import Overclustering, expect_packages
from lightning_modules.base import UnsupervisedSegmenter
from retrieval.whitening import reduction

PURPOSE = "overcluster"


class OverclusterFit(L.Callback):
    """Sees the evaluated pictures once before each evaluation; nothing of it is kept in a checkpoint, as it is made
    again to the same values."""

    def __init__(self, cfg: DictConfig, data: SegmentationDataModule) -> None:
        self.cfg, self.data = cfg, data
        self.own = cfg.evaluation.cbfe

    def check(self, model: UnsupervisedSegmenter) -> None:
        """Raises ConfigError for a missing package, attention that the backbone does not have, and fewer codes than
        clusters, as far as that is known before reading (see `KMeansFit.check`)."""
        item = waiting(model)
        if item is None:
            return
        expect_packages(self.cfg)
        backbone = model.backbone
        if (
            self.own.clusters
            and self.own.masks == "attention"
            and not (backbone.has_attention and backbone.class_token)
        ):
            raise ConfigError(
                f"evaluation.cbfe.masks=attention: backbone={backbone.name} has no class token whose attention was "
                "trained; set evaluation.cbfe.masks=spectral or auto"
            )
        if self.cfg.data.eval_crop == "keep":
            return
        size, patch = self.cfg.data.eval_size, min(backbone.strides)
        height, width = (size, size) if isinstance(size, int) else size
        count = len(self.data.source("val"))
        patches = -(-height // patch) * -(-width // patch)
        points = self.cfg.evaluation.overcluster.points
        if points is not None:
            patches = min(patches, max(1, points // count))
        key, most = item.most_clusters()
        if count * patches < most:
            raise ConfigError(
                f"{key}={most}: needs a code a cluster, and {count} validation pictures with {patches} codes each give "
                f"{count * patches}; lower it, raise evaluation.overcluster.points, or give more pictures"
            )

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        item = waiting(pl_module)
        if item is None:
            return
        kind = masks.kind_for(self.own.masks, pl_module.backbone) if self.own.clusters else ""
        count = len(self.data.source("val"))
        total = count + self.own.train_pictures
        rows, found = [], {}
        for batch, codes, masked in self.seen(trainer, pl_module, "val", kind):
            rows += self.chosen(batch, codes, total)
            found |= pictures.masked(batch, masked, self.size) if masked is not None else {}
        every = [self.gathered(pl_module, rows)]
        found = {index: mask for part in distributed.objects(found) for index, mask in part.items()}
        if self.own.clusters and self.own.train_pictures:
            rows = []
            for batch, codes, _ in self.seen(trainer, pl_module, "train", ""):
                rows += self.chosen(batch, codes, total)
            every.append(self.gathered(pl_module, rows))
        item.begin(reduction(torch.cat(every), self.cfg.evaluation.overcluster.dims), [], found, kind)
        if self.own.clusters and self.own.train_pictures:
            kept: list[pictures.Picture] = []
            for batch, codes, masked in self.seen(trainer, pl_module, "train", kind):
                own = pictures.masked(batch, masked, self.size)
                kept += item.taken(batch, codes, own, labelled=item.cut_by_labels or item.searches)
            item.trained = [picture for part in distributed.objects(kept) for picture in part]

    @property
    def size(self) -> int | None:
        return self.cfg.evaluation.overcluster.size

    def chosen(self, batch: dict[str, Any], codes: Tensor, total: int) -> list[Tensor]:
        """Codes [n,D] of each picture that the reduction is fitted to, of `total` pictures."""
        found = []
        inside = readout.valid_patches(batch["valid"], codes.shape[-2:]).flatten(1)
        for index, own, valid in zip(batch["index"].tolist(), codes.flatten(2).mT, inside, strict=True):
            own = own[valid.to(own.device)]
            some = pictures.some(len(own), total, self.cfg.evaluation.overcluster.points, self.cfg.seed, index)
            found.append(own if some is None else own[some.to(own.device)])
        return found

    @staticmethod
    def gathered(model: UnsupervisedSegmenter, rows: list[Tensor]) -> Tensor:
        """The rows of all ranks, in the order of one process."""
        own = torch.cat(rows) if rows else torch.empty(0, model.code_dim, device=model.device)
        return distributed.gather_uneven(own.float())

    def seen(
        self, trainer: L.Trainer, model: UnsupervisedSegmenter, split: str, kind: str
    ) -> Iterator[tuple[dict[str, Any], Tensor, Tensor | None]]:
        """(batch, codes [B,D,h,w] as in evaluation, noisy foreground bool [B,h,w] where `kind` is not empty)."""
        if split == "val":
            loader = self.data.loader("val", geometry="eval", purpose=PURPOSE)
        else:
            item = waiting(model)
            labels = item.cut_by_labels or item.searches
            source = self.data.labelled_source() if labels else self.data.own_source()
            loader = self.data.loader(
                source, geometry="eval", order="shuffled", limit=self.own.train_pictures, purpose=PURPOSE
            )
        for batch in counted(loader, "over-clusters", len(loader)):
            images = batch["image"].to(model.device)
            with trainer.precision_plugin.forward_context():
                features = masked = None
                if split == "val" and model.window is None:
                    if kind == "attention" and plain(model):  # one pass gives both
                        features = model.backbone.features(images, attention=True)
                        masked = masks.by_attention(features, self.own.mass)
                    else:
                        features = model.features_of(batch | {"image": images})
                codes = model.read(images, features)[0]
                if kind and masked is None:
                    masked = masks.noisy_foreground(model.backbone, images, kind, self.own.mass)
            yield batch, codes, masked


def plain(model: UnsupervisedSegmenter) -> bool:
    """Whether the method sees what its backbone gives, computed anew."""
    kind = type(model)
    own = kind.features is UnsupervisedSegmenter.features and kind.features_of is UnsupervisedSegmenter.features_of
    return own and "val" not in model.kept_features


def waiting(model: UnsupervisedSegmenter) -> Overclustering | None:
    """The read-out of a method, where any of it is asked for."""
    return next((item for item in model.further.values() if isinstance(item, Overclustering)), None)
