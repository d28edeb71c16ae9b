"""Self-training in rounds: a segmenter learns pseudo-labels, gives the training pictures new ones, and a fresh one
learns these.

The rounds are phases of a run (`phases: [{share: 2}, {share: 1, method.round: 2}]`). Before the stage of a later round
the network of the one before becomes its teacher, which is in every checkpoint from then on, so a run that is killed in
any round, or while pictures are relabelled, goes on to the same bits. Source: COMUS (ICLR 2023), MaskDistill (2022).
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.spec import ViewSpec
from datamodules.base.transforms import Geometry
from evaluation.crf import DenseCRF, as_bytes
from lightning_modules.base import Loss
from lightning_modules.base.staged import StagedSegmenter
from lightning_modules.families.graph_cuts import patch_of, stage_geometry, stage_sides
from lightning_modules.families.segmenter import augmented, labels_of, trained_groups
from models.backbone import Backbone, Features
from models.deeplab import DeepLabHead
from models.momentum import Momentum
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, Results, Step, new_record, whole_patches
from pseudo_labels.views import Segments, View

MOST = 256
"""Classes whose ids fit into a byte."""


class SelfTrained(StagedSegmenter):
    """A base. The first round learns what `first_steps` lead to (`first_labels`), a later one what its teacher says.

    Codes = what the head's classifier reads. Class 0 is the background.
    """

    trains_backbone = None
    wants_features = False
    exports = "the backbone of the last round"

    def first_steps(self, data: Any) -> list[Step]:
        """The steps before the first round."""
        raise TypeError(f"{type(self).__name__} has to define first_steps()")

    def first_labels(self, results: Results) -> View:
        """Pseudo-labels of the first round."""
        raise TypeError(f"{type(self).__name__} has to define first_labels()")

    def objective(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """This rank's loss (its mean over ranks is that of the global batch), how many labelled pixels the global batch
        has, and what is logged; of logits [B,K,h,w] and labels int64 [B,H,W]."""
        raise TypeError(f"{type(self).__name__} has to define objective()")

    def build_segmenter(self) -> None:
        """For `build`: the head, its teacher, and that of the backbone where it is trained."""
        settings = self.cfg.method
        self.head = DeepLabHead(self.backbone.channels, settings.num_clusters, **settings.head)
        self.code_dim = settings.head.hidden
        self.teacher_head = Momentum(self.head)
        self.teacher_backbone = None if self.backbone.frozen else Momentum(self.backbone)
        self.register_buffer("taught", torch.zeros((), dtype=torch.int64))

    @property
    def round(self) -> int:
        """Number of this round, from 1."""
        return int(self.cfg.method.round)

    def train(self, mode: bool = True) -> "SelfTrained":
        """As usual, but the teacher stays in evaluation mode."""
        super().train(mode)
        for teacher in (self.teacher_head, self.teacher_backbone):
            if teacher is not None:
                teacher.eval()
        return self

    # ------------------------------------------------------------------ the stage

    @property
    def stage_files(self) -> str:
        """As in the base, with the round behind it."""
        return "pseudo_labels" if self.round == 1 else f"pseudo_labels_round{self.round}"

    def steps(self, data: Any) -> list[Step]:
        if self.round == 1:
            return self.first_steps(data)
        if int(self.taught) != self.round - 1:
            raise ConfigError(
                f"method.round={self.round}: a later round begins with the network of the one before; name it in "
                "`phases` alone, behind a phase of the round before"
            )
        return [Relabelled(self)]

    def staged(self, results: Results, data: Any) -> None:
        data.pseudo = self.labels(results)

    def labels(self, results: Results) -> View:
        """What this round learns."""
        return self.first_labels(results) if self.round == 1 else Segments(results[f"relabelled{self.round}"], None)

    def shown(self, results: Results) -> dict[str, View]:
        return {"pseudo-labels": self.labels(results)}

    # ------------------------------------------------------------------ rounds

    def enter(self, checkpoint: dict[str, Any]) -> None:
        """Take the teacher over: the network of the round that has ended, or, inside this round, its own teacher."""
        if self.round == 1:
            return
        state, ended = checkpoint["state_dict"], checkpoint["global_step"] == self.first_step
        for name, teacher in (("head", self.teacher_head), ("backbone", self.teacher_backbone)):
            if teacher is None:
                continue
            prefix = f"{name}." if ended else f"teacher_{name}.copy."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            teacher.copy.load_state_dict(own)
        self.taught.fill_(self.round - 1)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        training = self._trainer is not None and self._trainer.state.fn == "fit"
        if training and self.round > 1 and checkpoint["global_step"] == self.first_step:  # a round begins anew
            checkpoint["state_dict"] = {name: value.clone() for name, value in self.state_dict().items()}
            checkpoint["labelfree"]["stage"] = None
        super().on_load_checkpoint(checkpoint)

    # ------------------------------------------------------------------ the segmenter

    @property
    def views(self) -> dict[str, ViewSpec]:
        """What the segmenter learns on."""
        return augmented(self.cfg.method.augment)

    def param_groups(self) -> list[dict[str, Any]]:
        return trained_groups(self.head, self.backbone)

    def embed(self, features: Features) -> Tensor:
        return self.head(features.levels)

    def classify(self, codes: Tensor) -> Tensor:
        """Logits [B,K,h,w]."""
        return self.head.classify(codes)

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """The objective on every pixel that has a pseudo-label; a batch without any teaches nothing."""
        codes, labels = self.embed(self.features(views["augmented"])), labels_of(views)
        loss, known, parts = self.objective(self.head.classify(codes), labels)
        parts |= {"labelled": known / (labels.numel() * distributed.world_size())}
        return Loss(loss, parts, skip=known == 0, codes=codes, view="augmented")


class Relabelled(MapStep):
    """What the teacher of a round says of every training picture: `segments` [h,w], the class of every pixel of what it
    saw, and `names` of those that are there. No chance in it.

    With `method.relabel.crf=dense` the mean field of `evaluation/crf.py` refines its probabilities.
    """

    counted = "names"

    def __init__(self, method: SelfTrained) -> None:
        own = method.teacher_backbone
        super().__init__(method.backbone if own is None else None)
        self.name = f"relabelled{method.round}"
        self.network: Backbone = method.backbone if own is None else own.copy
        self.head: DeepLabHead = method.teacher_head.copy
        self.cfg, self.crf = method.cfg, None if method.cfg.method.relabel.crf == "none" else DenseCRF()
        self.digest = weights_digest(self.head if own is None else nn.ModuleList([self.head, self.network]))

    def settings(self) -> dict[str, Any]:
        refined = None if self.crf is None else str(self.crf.constants)
        head = self.cfg.method.head
        return {"weights": self.digest, "crf": refined, "rates": list(head.rates), "norm": head.norm}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg.method.stage, self.cfg.data.interpolation)

    def record_bytes(self) -> int:
        height, width = stage_sides(self.cfg.method.stage, self)
        return int(height * width) * (1 if self.cfg.method.num_clusters <= MOST else 2) + 1000

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = whole_patches(batch, patch_of(self.network))
        logits = self.head.classify(self.head(self.network.features(images).levels)).float()
        maps = F.interpolate(logits, size=images.shape[-2:], mode="bilinear", align_corners=False)
        if self.crf is not None:
            maps = self.crf(as_bytes(images[:, :3]), [maps])[0]
        ids = maps.argmax(1).to(torch.uint8 if maps.shape[1] <= MOST else torch.int16)
        size = tuple(images.shape[-2:])
        return [new_record(batch, row, images, size, segments=own, names=own.unique()) for row, own in enumerate(ids)]


def weights_digest(module: nn.Module) -> str:
    """A name for the weights of a module: hexadecimal, 16 digits."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]
