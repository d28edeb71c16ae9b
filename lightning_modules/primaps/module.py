"""PriMaPs-EM (Hahn et al., TMLR 2024): prototypes on frozen features, fitted to masks by a stochastic EM.

Offline, every picture is split into masks by the principal directions of its own features. Then K prototypes begin as
principal directions of all features, become centroids by a spherical k-means with gradient, and are fitted: a slow copy
of them gives every mask the class that it predicts most often there (E), and they learn these labels on a recoloured
picture, rare classes weighing more (M). The copy is the classifier, scored as val/own/*. `method.init_from` puts the
codes and the cluster probe of a trained method in place of features and first prototypes. Code: visinf/primaps.

Here, and not as released: features are centred, in masks about the picture's mean and in codes about that of all
pictures (`method.masks.centred`, `method.centred`), directions have a sign (`method.masks.sign`), masks cover whole
pictures, colours are changed before the network normalises, and the linear probe goes on learning when the EM begins.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.spec import IGNORE, Photometric, ViewSpec
from datamodules.base import SegmentationDataModule
from evaluation import readout
from grouping.principal import Moments
from lightning_modules.base import Loss
from lightning_modules.base.staged import StagedSegmenter, check_stage
from lightning_modules.primaps.masks import PrincipalMasks
from lightning_modules.primaps.trained import expect_same_features, frozen_method
from losses.pseudo_labels import balanced_cross_entropy, majority
from models.backbone import Features
from models.heads import PrototypeHead
from models.momentum import Momentum, warmed_up
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import Segments, View


class PriMaPs(StagedSegmenter):
    """Codes = the backbone's features, less their mean with `method.centred`, or those of the method that
    `method.init_from` was trained with."""

    title = "PriMaPs-EM"

    def build(self) -> None:
        settings = self.cfg.method
        check_stage(settings.stage, self.backbone)
        self.refuse_padding()
        self.base = frozen_method(self.cfg, self.meta, self.backbone) if settings.base else None
        self.stands_on = settings.base.name if settings.base else None
        self.code_dim = self.backbone.dim if self.base is None else self.base.code_dim
        self.start_steps = settings.start.steps if self.base is None else 0
        if self.base is None and settings.num_clusters > self.code_dim:
            raise ConfigError(
                f"method.num_clusters={settings.num_clusters}: features have {self.code_dim} channels, and so many "
                "principal directions at most; lower it, or take more backbone.levels"
            )
        self.running = PrototypeHead(self.code_dim, settings.num_clusters)
        self.momentum = Momentum(self.running)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("centre", torch.zeros(self.code_dim))

    # ------------------------------------------------------------------ the stage

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        return [PrincipalMasks(self.backbone, self.cfg)]

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        data.pseudo = Segments(results["masks"], None)

    def shown(self, results: Results) -> dict[str, View]:
        return {"principal masks": Segments(results["masks"], None)}

    # ------------------------------------------------------------------ codes and classes

    def take_start(self, checkpoint: dict[str, Any]) -> None:
        """Weights of the trained method, and its cluster probe for the first prototypes (their directions, at length
        1). Raises CheckpointError where it was trained on other features."""
        expect_same_features(checkpoint, self.cfg, self.backbone)
        state = checkpoint["state_dict"]
        if self.backbone.debias is not None:  # what was fitted to the pictures that the method has seen
            own = {name: state[f"backbone.debias.{name}"] for name in self.backbone.debias.state_dict()}
            self.backbone.debias.load_state_dict(own)
        self.base.load_state_dict({name: state[name] for name in self.base.state_dict()})
        self.running.start(F.normalize(state["cluster_probe.clusters"].float(), dim=1))

    def train(self, mode: bool = True) -> "PriMaPs":
        """As usual, but the trained method stays in evaluation mode: without dropout."""
        super().train(mode)
        if self.base is not None:
            self.base.eval()
        return self

    def features(self, images: Tensor) -> Features:
        return super().features(images) if self.base is None else self.base.features(images)

    def embed(self, features: Features) -> Tensor:
        if self.base is not None:
            return self.base.embed(features)
        return features.concat() - self.centre[:, None, None]

    def classify(self, codes: Tensor) -> Tensor:
        """Logits of the slow prototypes."""
        return self.momentum(codes)

    @property
    def views(self) -> dict[str, ViewSpec]:
        """Every picture blurred, some in other colours or in grey."""
        augment = self.cfg.method.augment
        names = ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p", "blur_p", "blur_kernel")
        values = {name: augment[name] for name in (*names, "either", "faithful")}
        return {"augmented": ViewSpec(Photometric(**values, blur_sigma=tuple(augment.blur_sigma)))}

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"name": "prototypes", "params": self.running.parameters()}]

    # ------------------------------------------------------------------ the start

    @torch.no_grad()
    def prepare(self, loader: Callable[..., Any]) -> None:
        """The first prototypes: principal directions of the features of training pictures, unless `init_from` gave
        them; and the mean of these features, which codes are without. The slow prototypes begin as the running ones."""
        if self.base is None:
            moments = Moments.none(self.code_dim, self.device)
            limit = self.cfg.method.start.pictures
            for batch in loader("train", "train", order="shuffled", limit=limit, purpose="primaps.start"):
                codes = self.embed(self.frozen_features("train", batch))
                moments = moments + Moments.of(codes.transpose(0, 1).flatten(1).T)
            moments = moments.of_all_ranks()
            self.running.start(moments.directions(self.cfg.method.num_clusters).float())
            if self.cfg.method.centred:
                self.centre.copy_(moments.sum / moments.count)
        self.momentum.update(0.0)

    @property
    def starting(self) -> bool:
        """Whether this step is one of the k-means by gradient before the EM."""
        return self.global_step < self.start_steps

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        with torch.no_grad():
            codes = self.embed(features).detach()
        if self.starting:
            return self._start_loss(codes)
        if self.global_step == self.start_steps:
            self._forget_moments()
        return self._em_loss(views, codes)

    def _start_loss(self, codes: Tensor) -> Loss:
        """Minus the mean cosine of codes to the nearest direction; gains rest."""
        cosines = readout.cosines(codes, self.running.direction)
        total = -cosines.max(1).values.mean() + 0 * self.running.gain.sum()
        return Loss(total, {"start": total.detach()}, codes=codes)

    def _forget_moments(self) -> None:
        """The EM begins with a new optimiser of the prototypes."""
        for child in self.optimizers().optimizer.children:
            for value in self.running.parameters():
                child.state.pop(value, None)

    # ------------------------------------------------------------------ EM

    def _em_loss(self, views: dict[str, Any], codes: Tensor) -> Loss:
        """Labels of the masks by the slow prototypes, and the running ones' loss on them in the recoloured picture."""
        masks = torch.where(views["pseudo"] == 0, IGNORE, views["pseudo"])
        prediction = readout.predict(self.momentum(codes), tuple(masks.shape[-2:]))
        classes = self.cfg.method.num_clusters
        labels = majority(masks, prediction, classes)
        with torch.no_grad():
            seen = self.embed(self.features(views["augmented"])).detach()
        logits = self.running(seen)
        loss, _ = balanced_cross_entropy(logits, labels, self.cfg.method.gamma, distributed.mean)
        return Loss(loss, self._watched(loss, labels, logits.detach(), prediction, classes), codes=codes)

    @torch.no_grad()
    def _watched(
        self, loss: Tensor, labels: Tensor, logits: Tensor, prediction: Tensor, classes: int
    ) -> dict[str, Tensor]:
        """For the log: what says whether masks are of one class each, classes stay spread, and both heads agree. Shares
        of the global batch."""
        inside = labels != IGNORE
        learnt = readout.predict(logits, tuple(labels.shape[-2:]))
        counts = [inside.sum(), ((prediction == labels) & inside).sum(), (learnt == prediction).sum()]
        wins = torch.bincount(prediction.flatten(), minlength=classes)
        labelled, pure, agreed, *wins = distributed.total(torch.cat([torch.stack(counts), wins]).double())
        wins = torch.stack(wins)
        pixels = wins.sum()
        return {
            "cross_entropy": loss.detach(),
            "labelled": labelled / pixels,
            "purity": pure / labelled.clamp(min=1),
            "agreement": agreed / pixels,
            "used": torch.special.entr(wins / pixels).sum().exp(),
        }

    def after_step(self) -> None:
        """The slow prototypes follow: at every step of the start as a copy, then every `ema.every` steps."""
        settings, done = self.cfg.method.ema, self.global_step - self.start_steps
        if done < 0:
            self.momentum.update(0.0)
        elif done and done % settings.every == 0:
            self.updates += 1
            self.momentum.update(warmed_up(int(self.updates), settings.decay))
