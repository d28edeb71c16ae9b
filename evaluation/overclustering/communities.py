"""Communities of the clusters of a foreground, and their scores. Source: Leopart (CVPR 2022)."""

import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common import chance
from evaluation import matching
from evaluation.overclustering import graph
from evaluation.overclustering.clusters import Clusters, Extraction, Rules, summarised

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grouping:
    """How clusters become communities."""

    clusters: int
    """Of the foreground; the background is one more."""
    weight: float
    """Least weight of an edge."""
    time: float


@dataclass
class Communities(Clusters):
    """Clusters of the foreground and their communities."""

    groups: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 [K+1], of the first seed; 0: alone."""


class CommunityFinder:
    """Communities of the clusters of a foreground; what does not depend on all settings is kept between calls."""

    def __init__(
        self, found: Extraction, algorithm: str, angles: str, distances: Sequence[int], count: int, rules: Rules
    ) -> None:
        self.found, self.rules = found, rules
        self.algorithm, self.angles, self.distances, self.count = algorithm, angles, tuple(distances), count
        self.points = found.all.points(rules)
        self.kept: dict[int, tuple[Tensor, list[Tensor], Tensor]] = {}

    def graph(self, k: int) -> tuple[Tensor, list[Tensor], Tensor]:
        """Centroids [K,d], the ids [h*w] of every picture and the matrix of co-occurrence [K+1,K+1]."""
        if k not in self.kept:
            centroids = self.rules.fit(self.points, k, "communities")
            every = self.found.all
            ids = every.named(centroids, self.rules)
            maps = [picture.at_places(own) for picture, own in zip(every.pictures, ids, strict=True)]
            self.kept[k] = centroids, ids, graph.cooccurrence(maps, k + 1, self.distances, self.angles)
        return self.kept[k]

    def groups(self, settings: Grouping, number: int) -> Tensor:
        """The community of each cluster, int64 [K+1], by the seed of this number."""
        matrix = self.graph(settings.clusters)[2]
        return graph.communities(
            graph.edges(matrix, settings.weight), len(matrix), algorithm=self.algorithm, time=settings.time,
            count=self.count, seed=chance.key(self.rules.seed, "communities.seed", number),
        )  # fmt: skip

    def scores(self, settings: Grouping, number: int, of_training: bool = False) -> matching.Scores:
        """One-to-one with the classes of the pictures that are scored, or of the training pictures."""
        groups, ids = self.groups(settings, number), self.graph(settings.clusters)[1]
        trained = len(ids) - len(self.found.scored.pictures)
        pictures = self.found.trained.pictures if of_training else self.found.scored.pictures
        own = [groups[row] for row in (ids[:trained] if of_training else ids[trained:])]
        return self.rules.one_to_one(self.rules.counts(pictures, own, int(groups.max()) + 1))

    def run(self, settings: Grouping, seeds: int) -> Communities | None:
        """Communities once for each seed; None where there are fewer foreground patches than clusters."""
        if len(self.points) < settings.clusters:
            log.warning(
                "communities: %d patches are foreground, fewer than the %d clusters; there are none",
                len(self.points), settings.clusters,
            )  # fmt: skip
            return None
        every = [self.groups(settings, number) for number in range(seeds)]
        values = {"count": statistics.fmean(len(groups.unique()) for groups in every)}
        classes = None
        if self.rules.classes and any(picture.label is not None for picture in self.found.scored.pictures):
            scores = [self.scores(settings, number) for number in range(seeds)]
            values, classes = summarised(scores) | values, scores[0].mapping[every[0].numpy()]
        return Communities(self.graph(settings.clusters)[0], classes, values, every[0])

    def searched(self, trials: int) -> Grouping:
        """READS THE LABELS of the training pictures: the settings of best mIoU there, as released (a tree-structured
        Parzen estimator over weight 0.01 to 0.1, time 0.1 to 2 and 99 to 249 clusters)."""
        import optuna  # imported here alone: it takes a second

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        sampler = optuna.samplers.TPESampler(seed=chance.key(self.rules.seed, "communities.search") % 2**32)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        least = min(99, len(self.points))
        most = least + max(0, min(249, len(self.points)) - least) // 10 * 10

        def objective(trial: "optuna.Trial") -> float:
            settings = Grouping(
                trial.suggest_int("clusters", least, most, step=10),
                trial.suggest_float("weight", 0.01, 0.1, step=0.01),
                trial.suggest_float("time", 0.1, 2.0, step=0.1),
            )
            miou = self.scores(settings, 0, of_training=True).miou
            return 0.0 if np.isnan(miou) else miou

        study.optimize(objective, n_trials=trials)
        return Grouping(**study.best_params)
