"""Clusters of the reduced codes of all pictures, and their scores: over-clusters, and those of the foreground.

Source: Leopart (CVPR 2022). K clusters, C classes; a count is a place that is scored.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from common import chance
from common.errors import ConfigError
from common.spec import IGNORE
from evaluation import matching
from evaluation.overclustering import foreground
from evaluation.overclustering.pictures import Picture, sample
from retrieval import kmeans

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """How clusters are fitted and scored, the same for all of these read-outs."""

    classes: int
    """C; 0 without labels."""
    seed: int
    iterations: int
    restarts: int
    points: int | None
    """Points that k-means is fitted to at most, evenly over the pictures; None: all."""
    absent: str
    background: int
    """The class of clusters that a one-to-one matching leaves over."""
    device: torch.device

    def fit(self, points: Tensor, k: int, purpose: str, number: int = 0, spherical: bool = False) -> Tensor:
        """Centroids [K,d] of points [n,d], keyed by purpose and number."""
        settings = {"iterations": self.iterations, "restarts": self.restarts, "spherical": spherical}
        seed = chance.key(self.seed, purpose, number)
        return kmeans.fit(points.to(self.device), k, seed=seed, **settings).centroids

    def sample(self, pictures: Sequence[Picture]) -> Tensor:
        """The points of pictures that k-means is fitted to, [n,d]."""
        return sample(pictures, self.points, self.seed)

    def assign(self, picture: Picture, centroids: Tensor, spherical: bool = False) -> Tensor:
        """The cluster of each patch: int64 [h*w], on the CPU."""
        return kmeans.assign(picture.points.to(self.device), centroids, spherical).cpu()

    def counts(self, pictures: Sequence[Picture], ids: Sequence[Tensor], k: int) -> np.ndarray:
        """int64 [K,C]: places by cluster (ids [h*w] of each picture) and class."""
        total = torch.zeros(k * self.classes, dtype=torch.int64)
        for picture, own in zip(pictures, ids, strict=True):
            if picture.label is not None:
                label = picture.label.long()
                known = (label != IGNORE) & (label < self.classes)
                cells = picture.at_places(own)[known] * self.classes + label[known]
                total += torch.bincount(cells, minlength=len(total))
        return total.view(k, self.classes).numpy()

    def score(self, counts: np.ndarray) -> matching.Scores:
        """One-to-one by IoU up to C clusters, many-to-one by precision above; clusters without a pixel, and those that
        a matching leaves over, become the background."""
        policy = "hungarian_iou" if len(counts) <= self.classes else "many_to_one"
        return matching.told_apart(matching.score(counts, policy, "background", self.absent, self.background))

    def one_to_one(self, counts: np.ndarray) -> matching.Scores:
        """One-to-one by IoU whatever the number of clusters."""
        found = matching.score(counts, "hungarian_iou", "background", self.absent, self.background)
        return matching.told_apart(found)


@dataclass
class Clusters:
    """Clusters as panels and scores need them."""

    centroids: Tensor
    """[K,d]"""
    classes: np.ndarray | None = None
    """[K] class of each cluster, of the first seed; None without labels."""
    values: dict[str, float] = field(default_factory=dict)
    """Scores by name, percent."""


def summarised(scores: Sequence[matching.Scores]) -> dict[str, float]:
    """Mean of `acc` and `miou`, and with several seeds their standard deviation (n - 1) as `acc_std`, `miou_std`."""
    found: dict[str, float] = {}
    for name in ("acc", "miou"):
        values = [getattr(item, name) for item in scores]
        found[name] = float(np.mean(values))
        if len(values) > 1:
            found[f"{name}_std"] = float(np.std(values, ddof=1))
    return found


def over_clusters(pictures: Sequence[Picture], k: int, seeds: int, rules: Rules) -> Clusters:
    """k-means of the pictures' own codes into `k` clusters, matched with their own labels, once for each seed."""
    scores, first, points = [], None, rules.sample(pictures)
    for number in range(seeds):
        centroids = rules.fit(points, k, f"overcluster/{k}", number)
        ids = [rules.assign(picture, centroids) for picture in pictures]
        scores.append(rules.score(rules.counts(pictures, ids, k)))
        first = centroids if first is None else first
    return Clusters(first, scores[0].mapping, summarised(scores))


@dataclass
class Found:
    """Pictures and which of their patches are foreground."""

    pictures: list[Picture]
    inside: list[Tensor]
    """bool [h*w] of each picture."""

    def points(self, rules: Rules) -> Tensor:
        """Reduced codes of the foreground [n,d], as k-means is fitted to them."""
        return rules.sample(self._foreground)

    @cached_property
    def _foreground(self) -> list[Picture]:
        kept = []
        for picture, inside in zip(self.pictures, self.inside, strict=True):
            own = picture.points[inside]
            empty = torch.zeros(0, dtype=torch.int64)
            kept.append(Picture(picture.index, own, (1, len(own)), empty, empty))
        return kept

    def named(self, centroids: Tensor, rules: Rules) -> list[Tensor]:
        """The cluster of each patch, the background being K: int64 [h*w]."""
        return [
            torch.where(inside, rules.assign(picture, centroids), len(centroids))
            for picture, inside in zip(self.pictures, self.inside, strict=True)
        ]


@dataclass
class Extraction:
    """Cluster-based foreground extraction."""

    centroids: Tensor
    """[K,d] of the clusters that masks vote for, unit length."""
    foreground: Tensor
    """int64 [n]: those that are foreground in the pictures that are scored."""
    threshold: float
    trained: Found | None
    """Training pictures, where they take part."""
    scored: Found

    @property
    def all(self) -> Found:
        """Training pictures and those that are scored."""
        if self.trained is None:
            return self.scored
        pictures = self.trained.pictures + self.scored.pictures
        return Found(pictures, self.trained.inside + self.scored.inside)


def extract(
    trained: list[Picture],
    scored: list[Picture],
    k: int,
    threshold: float | None,
    objects: Sequence[int],
    rules: Rules,
) -> Extraction:
    """The foreground of pictures by `k` clusters of all their codes (spherical k-means).

    Precisions are those of the training pictures for these, and of the pictures that are scored for those. threshold:
    least precision of a foreground cluster; None: READS THE LABELS of the training pictures, see `foreground.cuts`.
    """
    centroids = rules.fit(rules.sample([*trained, *scored]), k, "cbfe", spherical=True)
    parts = []
    for pictures in (part for part in (trained, scored) if part):
        ids = [rules.assign(picture, centroids, spherical=True) for picture in pictures]
        maps = [picture.at_places(own) for picture, own in zip(pictures, ids, strict=True)]
        precision = foreground.precisions(maps, [picture.mask for picture in pictures], k)
        if threshold is None:
            known = [number for number, picture in enumerate(pictures) if picture.label is not None]
            if not known:
                raise ConfigError(
                    "evaluation.cbfe.cut=labels: no training picture that was read has a label; set "
                    "evaluation.cbfe.cut=threshold"
                )
            truth = [pictures[number].label.long() for number in known]
            threshold = foreground.chosen(
                foreground.cuts([maps[number] for number in known], truth, objects, precision)
            )
        chosen = foreground.above(precision, threshold)
        parts.append(Found(pictures, [torch.isin(own, chosen) for own in ids]))
    return Extraction(centroids, chosen, threshold, parts[0] if trained else None, parts[-1])


def objects_found(scored: Found, objects: Sequence[int]) -> dict[str, float]:
    """`share` of the places that are foreground, and where labels say what objects are, `iou` with them; percent."""
    masks = [picture.at_places(inside) for picture, inside in zip(scored.pictures, scored.inside, strict=True)]
    values = {"share": 100 * float(np.mean([float(mask.double().mean()) for mask in masks]))}
    known = [number for number, picture in enumerate(scored.pictures) if picture.label is not None]
    if objects and known:
        truth = [scored.pictures[number].label.long() for number in known]
        values["iou"] = 100 * foreground.overlap([masks[number] for number in known], truth, objects, "out")
    return values


def foreground_clusters(found: Extraction, k: int, seeds: int, rules: Rules) -> dict[str, float]:
    """Scores of k-means of the foreground into `k` clusters beside the background, one-to-one with the classes."""
    points = found.all.points(rules)
    if len(points) < k:
        log.warning("cbfe: %d patches are foreground, fewer than the %d clusters; no scores of them", len(points), k)
        return {}
    scores = []
    for number in range(seeds):
        ids = found.scored.named(rules.fit(points, k, "cbfe.classes", number), rules)
        scores.append(rules.one_to_one(rules.counts(found.scored.pictures, ids, k + 1)))
    return summarised(scores)
