"""Probes that are fitted after training, on codes of the training pictures, before an evaluation that needs them."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

from common import chance, distributed
from common.errors import ConfigError
from common.spec import IGNORE
from datamodules.base import SegmentationDataModule
from datamodules.base.module import Source
from datamodules.base.sampling import permutation
from engine.callbacks.screen import counted
from evaluation import readout
from evaluation.fcn_probe import FCNReadout
from evaluation.probes import LinearProbe, clusters_of
from evaluation.retrieval import SegmentBank, SegmentRetrieval
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.optim import ALGORITHMS, schedule_factor
from lightning_modules.base.segmenter import split_labels
from retrieval import kmeans

log = logging.getLogger(__name__)


class KMeansFit(L.Callback):
    """Fits the k-means probe on codes of the training pictures, on the device, before an evaluation that needs it."""

    def __init__(self, cfg: DictConfig, data: SegmentationDataModule) -> None:
        self.cfg = cfg
        self.data = data

    def check(self, model: UnsupervisedSegmenter) -> None:
        """Raises ConfigError where there will be fewer codes than clusters, as far as that is known before reading.

        Counted are the patches of the finest level; whole pictures (`data.eval_crop=keep`) differ in size, and are not.
        """
        settings, clusters = self.cfg.evaluation.kmeans, clusters_of(self.cfg, "kmeans")
        key = "method.num_clusters" if settings.clusters is None else "evaluation.kmeans.clusters"
        if settings.points < clusters:
            raise ConfigError(
                f"evaluation.kmeans.points={settings.points}: the k-means probe needs a point a cluster, and {key} is "
                f"{clusters}; set {clusters} or more"
            )
        if self.cfg.data.eval_crop == "keep":
            return
        pictures = min(settings.pictures, self.data.clustered_count())
        if settings.sample == "batch":
            if (batches := -(-pictures // int(self.cfg.data.eval_batch_size))) < clusters:
                raise ConfigError(
                    f"evaluation.kmeans.sample=batch: the k-means probe needs a point a cluster, {key} is {clusters}, "
                    f"and {pictures} pictures give one of each of {batches} batches; lower data.eval_batch_size"
                )
            return
        size, patch = self.cfg.data.eval_size, min(model.backbone.strides)
        height, width = (size, size) if isinstance(size, int) else size
        patches = min(-(-height // patch) * -(-width // patch), max(1, settings.points // pictures))
        if pictures * patches < clusters:
            raise ConfigError(
                f"{key}={clusters}: the k-means probe needs a point a cluster, and {pictures} training "
                f"pictures with {patches} codes each give {pictures * patches}; lower {key}, give more "
                "pictures, or raise evaluation.kmeans.pictures and evaluation.kmeans.points"
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        if pl_module.kmeans_probe.fitted:
            return
        settings = self.cfg.evaluation.kmeans
        codes = self.training_codes(trainer, pl_module, settings.pictures, settings.points)
        probe = pl_module.kmeans_probe
        if probe.reduces:
            probe.fit_axes(codes, whiten=settings.reduce == "whiten")
            codes = probe.reduced(codes.T[None, :, :, None])[0, :, :, 0].T  # unit codes, so unit ones again
        result = kmeans.fit_distributed(
            codes,
            clusters_of(self.cfg, "kmeans"),
            spherical=True,
            seed=self.cfg.seed,
            iterations=settings.iterations,
            restarts=settings.restarts,
            init=settings.init,
        )
        probe.set(result.centroids)

    @torch.no_grad()
    def training_codes(
        self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter, pictures: int, points: int
    ) -> torch.Tensor:
        """Unit codes of this rank's part of the chosen training pictures, [n,D]: all patches, or as many of each; with
        `evaluation.kmeans.sample=batch` one of each batch."""
        rows = []
        source = self.data.clustered_source()
        loader = self.data.loader(source, geometry="eval", order="shuffled", limit=pictures, purpose="kmeans")
        total = min(pictures, len(loader.dataset))
        for batch in counted(loader, "k-means", len(loader)):
            images = batch["image"].to(pl_module.device)
            with trainer.precision_plugin.forward_context():
                codes = pl_module.seen(images)["codes"].float()
            patches = F.normalize(codes.flatten(2), dim=1).transpose(1, 2)
            inside = readout.valid_patches(batch["valid"], codes.shape[-2:]).flatten(1)
            if self.cfg.evaluation.kmeans.sample == "batch":
                rows.append(self._single(batch["index"], patches[inside.to(patches.device)]))
                continue
            share = max(1, points // total)
            for index, picture, valid in zip(batch["index"].tolist(), patches, inside, strict=True):
                picture = picture[valid.to(picture.device)]
                if len(picture) > share:
                    order = torch.randperm(
                        len(picture), generator=chance.generator(self.cfg.seed, "kmeans.points", index)
                    )
                    picture = picture[order[:share].to(picture.device)]
                rows.append(picture)
        return torch.cat(rows) if rows else torch.empty(0, pl_module.code_dim, device=pl_module.device)

    def _single(self, indices: Tensor, codes: Tensor) -> Tensor:
        """One of the codes [n,D] of a batch, [1,D], or none where there are none; keyed by its first picture."""
        draws = chance.generator(self.cfg.seed, "kmeans.batch", int(indices[0]))
        return codes[torch.randint(len(codes), (1,), generator=draws)] if len(codes) else codes


class OwnFit(L.Callback):
    """Lets a method fit classes of its own that a run ends with (`fit_own`), before an evaluation that needs them.

    It comes before the other fits: it may change what codes are.
    """

    def on_validation_start(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        if not pl_module.own_fitted:
            with torch.inference_mode(False):  # Lightning evaluates in it, and running statistics are kept
                pl_module.fit_own()


class RetrievalFit(L.Callback):
    """Fills the bank of `evaluation.retrieval` with labelled segments of training pictures, before an evaluation.

    The pictures are seen as in evaluation. The bank is not kept in a checkpoint: it is made again, to the same rows.
    """

    def __init__(self, cfg: DictConfig, data: SegmentationDataModule) -> None:
        self.settings = cfg.evaluation.retrieval
        self.data = data

    @torch.no_grad()
    def on_validation_start(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        waiting = [item for item in pl_module.further.values() if isinstance(item, SegmentRetrieval) and not item.ready]
        if not waiting:
            return
        item = waiting[0]
        vectors, labels = [torch.empty(0, pl_module.code_dim)], [torch.empty(0, dtype=torch.int64)]
        source = self.data.labelled_source()
        loader = self.data.loader(
            source, geometry="eval", order="shuffled", limit=self.settings.pictures, purpose="retrieval"
        )
        for batch in counted(loader, "segments", len(loader)):
            if "label" not in batch:
                continue
            image, label, valid = (batch[key].to(pl_module.device) for key in ("image", "label", "valid"))
            with trainer.precision_plugin.forward_context():
                codes = pl_module.seen(image)["codes"]
            found = item.labelled(codes, label, valid)
            vectors.append(found.vectors.cpu())
            labels.append(found.labels.cpu())
        rows = [torch.cat(part).to(pl_module.device) for part in (vectors, labels)]
        bank = SegmentBank(*(distributed.gather_uneven(part) for part in rows))
        if not len(bank.labels):
            raise ConfigError(
                f"evaluation.retrieval.k={self.settings.k}: no training picture that was read has a label; set "
                "evaluation.retrieval.k=0, or raise evaluation.retrieval.pictures"
            )
        item.bank = bank


class PosthocFit(L.Callback):
    """Trains the post-hoc linear probe (`evaluation.posthoc.*`) before an evaluation, where it is asked for and absent.

    The network is frozen and in evaluation mode. Every epoch visits the labelled training pictures in the same keyed
    batches of `data.batch_size`, seen as in evaluation (no random crop, no flip), so their codes stay what they are and
    are kept in memory up to `evaluation.posthoc.keep_mb`; beyond it they are computed anew, to the same values.
    Labels are those of the training split. Several ranks share every batch.
    """

    group = "posthoc"
    called = "linear probe"

    def __init__(self, cfg: DictConfig, data: SegmentationDataModule) -> None:
        self.cfg = cfg
        self.settings = cfg.evaluation[self.group]
        self.data = data

    def check(self) -> None:
        """Raises ConfigError where the probe is asked for and no training picture is known to have a label."""
        if self.settings.epochs and not self.labelled():
            raise self.unlabelled()

    def labelled(self) -> list[int]:
        """Training pictures that the probe reads: those with a label, or all where the data set cannot tell."""
        source = self.data.source("train")
        if not self.data.meta.has_labels:
            return []
        return source.labelled() if hasattr(source, "labelled") else list(range(len(source)))

    def unlabelled(self) -> ConfigError:
        key = f"evaluation.{self.group}.epochs"
        return ConfigError(
            f"{key}={self.settings.epochs}: the probe learns from labels and no training picture has one; set {key}=0, "
            "or add labels of training pictures"
        )

    def on_validation_start(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        if not self.settings.epochs or self.present(pl_module):
            return
        with torch.inference_mode(False), torch.enable_grad():  # Lightning evaluates in inference mode
            self.give(pl_module, self.fit(trainer, pl_module))

    def present(self, model: UnsupervisedSegmenter) -> bool:
        """Whether the model has its probe."""
        return model.posthoc_probe is not None

    def new_probe(self, model: UnsupervisedSegmenter) -> nn.Module:
        """An untrained one."""
        return LinearProbe(model.code_dim, model.meta.num_classes, self.cfg.seed)

    def give(self, model: UnsupervisedSegmenter, probe: nn.Module) -> None:
        """The model takes the trained one."""
        model.set_posthoc(probe)

    def gradients(
        self, probe: nn.Module, codes: Tensor, label: Tensor, step: int, size: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Loss, and its gradients on this rank, of a global batch of `size` pictures. A collective."""
        loss = probe.loss(codes, label)
        return loss.detach(), torch.autograd.grad(loss, list(probe.parameters()))

    def fit(self, trainer: L.Trainer, model: UnsupervisedSegmenter) -> nn.Module:
        """The trained probe, the same on every rank. Raises ConfigError where no pixel has a label."""
        settings, device = self.settings, model.device
        probe = self.new_probe(model).to(device)
        momentum = {"momentum": settings.momentum} if settings.optimizer == "sgd" else {}
        optimizer = ALGORITHMS[settings.optimizer](
            probe.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, **momentum
        )
        source, batch_size, steps = self.arranged()
        shape = {"milestones": list(settings.milestones), "drop": settings.drop}
        step, learned, kept = 0, False, Kept(settings.keep_mb)
        for epoch in range(settings.epochs):
            batches = iter(kept.batches if kept.complete else self.batches(trainer, model, source, batch_size))
            for _ in counted(
                range(steps), self.called, steps
            ):  # a rank whose last pictures cannot be read still takes part in the sums
                codes, label = next(batches, None) or nothing(model.code_dim)
                if not kept.complete:
                    kept.add(codes, label)
                codes, label = codes.to(device), label.to(device).long()
                pixels = distributed.total(((label >= 0) & (label < model.meta.num_classes)).sum())
                factor = schedule_factor(settings.schedule, step, settings.epochs * steps, **shape)
                for group in optimizer.param_groups:
                    group["lr"] = settings.lr * factor
                step += 1
                if not pixels:
                    continue
                learned = True
                loss, gradients = self.gradients(probe, codes, label, step, batch_size)
                for parameter, gradient in zip(probe.parameters(), gradients, strict=True):
                    parameter.grad = distributed.mean(gradient)
                optimizer.step()
            kept.close()
            if learned:
                log.info("post-hoc %s: epoch %d of %d, loss %.4f", self.called, epoch + 1, settings.epochs, float(loss))
        if not learned:
            raise self.unlabelled()
        return probe

    def arranged(self) -> tuple["Chosen", int, int]:
        """(pictures in the order in which `loader` deals them out to the ranks, global batch size, steps an epoch).

        As in training, the pictures that fill no whole batch are left out; fewer than one batch make a batch.
        """
        indices = np.array(self.labelled())
        order = indices[permutation(len(indices), self.cfg.seed, "posthoc.order", 0)]
        world = distributed.world_size()
        size = min(int(self.cfg.data.batch_size), len(order))
        size = -(-size // world) * world  # at most world - 1 pictures are seen twice where there are so few
        steps = max(1, len(order) // size)
        order = np.resize(order, steps * size)
        shared = order.reshape(steps, world, size // world).transpose(1, 0, 2).ravel()  # every rank's part in a row
        return Chosen(self.data.source("train"), shared.tolist()), size, steps

    @torch.no_grad()
    def batches(
        self, trainer: L.Trainer, model: UnsupervisedSegmenter, source: "Chosen", batch_size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Codes [B,D,h,w] and labels [B,H,W] (ignored on padding) of this rank's pictures."""
        for batch in self.data.loader(source, geometry="eval", purpose="posthoc", batch_size=batch_size):
            views, label = split_labels(batch)
            with trainer.precision_plugin.forward_context():
                codes = model.embed(model.features(views["image"].to(model.device))).float()
            yield codes, torch.where(views["valid"], label, IGNORE)


class FCNFit(PosthocFit):
    """Trains the FCN probe (`evaluation.fcn.*`) in the same way."""

    group = "fcn"
    called = "FCN probe"

    def present(self, model: UnsupervisedSegmenter) -> bool:
        return FCNReadout.name not in model.further or model.further[FCNReadout.name].ready

    def new_probe(self, model: UnsupervisedSegmenter) -> nn.Module:
        return model.further[FCNReadout.name].new_probe(model.code_dim)

    def give(self, model: UnsupervisedSegmenter, probe: nn.Module) -> None:
        model.further[FCNReadout.name].take(probe)

    def gradients(
        self, probe: nn.Module, codes: Tensor, label: Tensor, step: int, size: int
    ) -> tuple[Tensor, Sequence[Tensor]]:
        return probe.gradients(codes, label, probe.drawn(step, size, len(codes)))


class Chosen:
    """Some pictures of a source, in a given order; a `datamodules.base.Source`."""

    def __init__(self, source: Source, indices: list[int]) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def id(self, index: int) -> str:
        return self.source.id(self.indices[index])

    def read(self, index: int) -> tuple[Any, Any]:
        return self.source.read(self.indices[index])


class Kept:
    """The batches of one pass in main memory, all of them or none: beyond `megabytes` nothing is kept."""

    def __init__(self, megabytes: int) -> None:
        self.room = megabytes * 2**20
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.complete = False

    def add(self, codes: Tensor, label: Tensor) -> None:
        """Keep one batch; labels take two bytes a pixel."""
        if self.room < 0:
            return
        label = label.short()
        self.room -= codes.nbytes + label.nbytes
        if self.room < 0:
            self.batches.clear()
        else:
            self.batches.append((codes.cpu(), label))

    def close(self) -> None:
        """The pass is over."""
        self.complete = self.room >= 0


def nothing(dim: int) -> tuple[Tensor, Tensor]:
    """A batch without a labelled pixel."""
    return torch.zeros(1, dim, 1, 1), torch.full((1, 1, 1), IGNORE)
