"""Mini-batch k-means: a fit of the points of the first batches, then centroids that every later group of batches moves.

Source: Sculley (WWW 2010), in the form that PiCIE (CVPR 2021) released: a whole k-means starts it, and a cluster moves
by the mean of its points of a group of batches, at a rate of their share among all the points it ever had.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common import distributed
from common.precision import exact
from retrieval import kmeans, search

TINY = 1e-6
"""Added to the number of a cluster's points, as released."""


@dataclass(frozen=True)
class Clusters:
    """What a pass over the data ends with; the same on every rank."""

    centroids: Tensor
    """float32 [K,D]: plain means, not of unit length."""
    fitted: Tensor
    """float32 [K,D]: the centroids after the first fit."""
    counts: Tensor
    """float64 [K]: points that each cluster has had, under the centroids of their time."""
    distance: float
    """Mean squared distance of the points to their centroid: of the fit and of every group, averaged over these."""


class MiniBatchKMeans:
    """Clusters of points that come in batches and are not kept.

    The points of the first `first` batches are fitted as a whole (`iterations` of Lloyd from `init`, keyed by `seed`,
    on rank 0). After that, the points of every `group` batches are assigned to the centroids as they are; a cluster
    with m of them, of mean mu, has n <- n + m points and moves to (1 - r) c + r mu, r = m / n. Batches at the end that
    fill no group move nothing; a pass that is shorter than `first` is fitted at its end. Sums and counts are of all
    ranks, so that several processes give what one gives, to rounding.
    """

    def __init__(self, k: int, *, first: int, group: int, iterations: int, init: str, seed: int) -> None:
        self.k, self.first, self.group = k, first, group
        self.settings = {"iterations": iterations, "init": init, "seed": seed}
        self.centroids: Tensor | None = None
        self.fitted: Tensor | None = None
        self.counts: Tensor | None = None
        self.waiting: list[Tensor] = []
        self.distances: list[float] = []

    def add(self, points: Tensor) -> None:
        """The points [n,D] of a batch, this rank's part of it. A collective: all ranks call it as often."""
        points = points.detach().float()
        if self.centroids is None:
            self.waiting.append(distributed.gather_uneven(points))  # in the order of one process
            if len(self.waiting) == self.first:
                self._fit()
            return
        self.waiting.append(points)
        if len(self.waiting) == self.group:
            self._move(torch.cat(self.waiting))
            self.waiting = []

    def finish(self) -> Clusters:
        """The clusters of the whole pass. A collective. Raises ConfigError for fewer points than clusters."""
        if self.centroids is None:
            self._fit()
        return Clusters(self.centroids, self.fitted, self.counts, sum(self.distances) / len(self.distances))

    def _fit(self) -> None:
        points = torch.cat(self.waiting)
        mine = points if distributed.rank() == 0 else points[:0]
        found = kmeans.fit_distributed(mine, self.k, spherical=False, restarts=1, **self.settings)
        self.centroids, self.fitted, self.counts = found.centroids, found.centroids, found.counts.double()
        self.distances, self.waiting = [found.objective], []

    @torch.no_grad()
    def _move(self, points: Tensor) -> None:
        with exact(points.device):
            gaps, ids = search.nearest(points, self.centroids, 1, "l2")
        ids = ids.squeeze(1)
        sums = points.new_zeros(self.centroids.shape, dtype=torch.float64).index_add_(0, ids, points.double())
        found = torch.bincount(ids, minlength=self.k).double()
        gap = gaps.double().sum()[None]
        joined = distributed.total(torch.cat([sums.flatten(), found, gap]))
        sums, found, gap = joined.split([sums.numel(), self.k, 1])
        means = sums.view(self.k, -1) / found.clamp(min=1)[:, None]
        self.counts = self.counts + found
        rate = (found / (self.counts + TINY))[:, None]
        self.centroids = ((1 - rate) * self.centroids.double() + rate * means).float()
        self.distances.append(float(gap) / max(1.0, float(found.sum())))
