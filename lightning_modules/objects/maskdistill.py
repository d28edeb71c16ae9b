"""MaskDistill (Van Gansbeke et al., 2022): one object a picture, named by k-means, distilled into a segmenter.

Offline, a mask of every picture (`method.masks.provider`; released: what the class token looks at and all that its keys
vote for) and a vector of every object, the class token of its crop. The vectors, whitened, are clustered; masks are
painted with their cluster, and a segmenter learns them by the pixels that it finds hardest. `phases` with
`method.round` retrain it on its own predictions, `method.relabel.crf` refines these. Scored as val/own/*. Code:
wvangansbeke/MaskDistill.

`method.detector.kind` puts a detector between, which learns the named masks and says again what pictures hold.

Here, and not as released: no detector unless it is asked for (its settings are not in the release), one backbone for
objects, detector and segmenter, plain k-means in place of mini-batches with keyed starts, ties of the attention mask in
raster order, clusters of a class are found anew in every validation and not on boxes of training pictures.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.spec import IGNORE
from lightning_modules.objects.detecting import Confident, NamedDetector, new_detector
from lightning_modules.objects.named import NamedObjects, object_rows
from losses.objects.hard_pixels import hard_pixel_loss
from pseudo_labels.steps import ReduceStep, Results, Step
from pseudo_labels.views import Segments, View
from retrieval import kmeans, whitening


class MaskDistill(NamedObjects):
    """Codes = what the segmenter's classifier reads."""

    title = "MaskDistill"

    @property
    def detects(self) -> bool:
        """Whether a detector stands between objects and segmenter."""
        return self.cfg.method.detector.kind != "none"

    def build(self) -> None:
        super().build()
        if self.detects:
            new_detector(self.cfg, self.backbone)  # refuses what cannot be, before a picture is read

    def naming(self) -> ReduceStep:
        return WhitenedNames(self.cfg, self.clusters)

    def first_steps(self, data: Any) -> list[Step]:
        found = super().first_steps(data)
        return (
            [*found, NamedDetector(self.cfg, self.backbone), Confident(self.cfg, self.backbone)]
            if self.detects
            else found
        )

    def first_labels(self, results: Results) -> View:
        return Segments(results["confident"], None) if self.detects else super().first_labels(results)

    def shown(self, results: Results) -> dict[str, View]:
        found = super().shown(results)
        if self.round > 1 or not self.detects:
            return found
        return {
            "objects": found["objects"],
            "named": super().first_labels(results),
            "pseudo-labels": found["pseudo-labels"],
        }

    def objective(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Cross-entropy of the hardest pixels of the global batch."""
        rank, share = distributed.rank(), self.cfg.method.hardest
        loss, hard = hard_pixel_loss(logits, labels, share, distributed.gather, rank)
        known = distributed.total((labels != IGNORE).sum().float())
        return loss, known, {"cross_entropy": loss.detach(), "hard": hard / (labels.numel() * distributed.world_size())}


class WhitenedNames(ReduceStep):
    """k-means of all objects, whitened: `spread` [D] (what vectors are divided by), `centroids` [K,D] and `assignment`
    int64 [n]."""

    name, needs = "clusters", ("objects",)

    def __init__(self, cfg: Any, count: int) -> None:
        self.method, self.count, self.seed = cfg.method, count, int(cfg.seed)

    def settings(self) -> dict[str, Any]:
        return {"count": self.count, "seed": self.seed} | dict(self.method.clusters)

    def table(self, results: Results, device: torch.device) -> dict[str, Tensor | np.ndarray]:
        rows = object_rows(results, self.count, device)
        spread = whitening.deviations(rows) if self.method.clusters.whiten else rows.new_ones(rows.shape[1])
        points = whitening.scaled(rows, spread)
        settings = {"spherical": False, "seed": self.seed, "restarts": self.method.clusters.restarts}
        centroids = kmeans.fit(points, self.count, **settings).centroids
        assignment = kmeans.assign(points, centroids, spherical=False)
        return {"spread": spread, "centroids": centroids, "assignment": assignment}
