"""SmooSeg (Lan et al., NeurIPS 2023): near features get one label, within a picture and across two; others do not.

A projector maps frozen features to codes, whose cosines to K prototypes are soft labels. A smoothness energy between
features and labels trains the projector through a slow teacher copy of the prototypes; their student is fitted to the
teacher's hard labels. The teacher is the classifier, scored as val/own/*. Code: mc-lan/SmooSeg.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from evaluation import readout
from lightning_modules.base import Loss
from lightning_modules.families import head_start
from lightning_modules.families.shifts import QuantileShifts
from losses.correspondence import random_negatives
from losses.smoothness import KINDS, Smoothness, data_term, smoothness, soft_labels
from models.backbone import Features
from models.heads import SegmentationHead, drop_channels, own_channel_masks
from models.momentum import towards

LOOKED = 121
"""Patches of a picture, evenly spaced, at whose pairs a shift is read by quantile (11 x 11, as STEGO samples)."""


class SmooSeg(QuantileShifts):
    """Codes s = head(features), with SiLU; prototypes: `student` is trained, `teacher` follows it and labels."""

    title = "SmooSeg"

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(settings)
        self.refuse_padding()
        self.code_dim = settings.dim
        nonlinear = settings.projection == "nonlinear"
        self.head = SegmentationHead(self.backbone.dim, settings.dim, nonlinear=nonlinear, activation=nn.SiLU)
        start = F.normalize(nn.init.xavier_normal_(torch.empty(settings.num_clusters, settings.dim)), dim=1)
        self.student = nn.Parameter(start)
        self.register_buffer("teacher", start.clone())
        self.build_shifts()

    def prepare(self, loader: Callable[..., Any]) -> None:
        """The head's start, see `method.head_start`."""
        head_start.begin(self, loader)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"name": "head", "params": self.head.parameters()}, {"name": "prototypes", "params": [self.student]}]

    def embed(self, features: Features) -> Tensor:
        return self.head(features.concat())

    def prototypes(self) -> Tensor:
        return self.teacher

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """Smoothness of the teacher's soft labels, which trains the head alone; and the student's cross-entropy, which
        trains the student alone. The teacher follows the student of before this step, as released."""
        settings, frozen = self.cfg.method, features.concat()
        codes = self.head(frozen, (self._mask("linear", frozen), self._mask("nonlinear", frozen)))
        signal = drop_channels(frozen, self._mask("signal", frozen) if settings.dropout.signal else None)
        taught = readout.cosines(codes, self.teacher)
        learnt = readout.cosines(codes.detach(), self.student)
        labels = soft_labels(taught, settings.temperature)
        found = self._smoothness(signal, labels)
        data = data_term(learnt, taught.detach())
        parts = {**found.energies, "data": data, **self._watched(found, labels.detach(), taught, learnt)}
        towards(self.teacher, self.student, settings.ema)
        weights = settings.terms
        total = sum((weights[kind].weight * energy for kind, energy in found.energies.items()), start=data)
        return Loss(total, {name: torch.as_tensor(value).detach() for name, value in parts.items()}, codes=codes)

    def _smoothness(self, signal: Tensor, labels: Tensor) -> Smoothness:
        settings = self.cfg.method
        shifts = {kind: settings.terms[kind].shift for kind in KINDS}
        cells = signal.shape[2] * signal.shape[3]
        return smoothness(
            signal,
            labels,
            self._partners(len(signal)).to(signal.device),
            shifts,
            pointwise=settings.pointwise,
            reach=self.reach,
            average=distributed.mean,
            shift_of=lambda kind, pairs: self.shift_of(kind, [pairs]),
            places=spaced(cells, signal.device) if None in shifts.values() else None,
        )

    def _partners(self, pictures: int) -> Tensor:
        """The picture of all that are reached that each of this rank's is compared with, int64 [B]."""
        count, first = pictures * self.reach.ranks(), self.reach.rank() * pictures
        key = self.cfg.seed, self.global_step, 1, count, self.cfg.method.partners, self.reach.part()
        return random_negatives(*key, purpose="smooseg.partners")[0, first : first + pictures]

    @torch.no_grad()
    def _watched(self, found: Smoothness, labels: Tensor, taught: Tensor, learnt: Tensor) -> dict[str, Tensor]:
        """For the log: whether labels stay sharp and spread, and whether the student keeps up; a collective."""
        best = taught.argmax(1)
        mean = distributed.mean(labels.mean((0, 2, 3)))
        return {
            **{f"discontinuity_{kind}": value for kind, value in found.discontinuities.items()},
            **self.shifts_by_quantile(found.shifts),
            "entropy": torch.special.entr(labels).sum(1).mean(),
            "used": torch.special.entr(mean).sum().exp(),
            "agreement": (learnt.argmax(1) == best).float().mean(),
        }

    def _mask(self, use: str, maps: Tensor) -> Tensor | None:
        key = (self.cfg.seed, f"smooseg.dropout.{use}", self.global_step)
        return own_channel_masks(*key, maps, self.cfg.method.dropout.p)


def spaced(cells: int, device: torch.device) -> Tensor:
    """At most LOOKED of a picture's patches, evenly spaced, int64 [S]."""
    step = max(1, -(-cells // LOOKED))
    return torch.arange(step // 2, cells, step, device=device)


def check_settings(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    if not any(term.weight for term in settings.terms.values()):
        raise ConfigError("method.terms: both weights are 0, so the projector would learn nothing; set one above 0")
