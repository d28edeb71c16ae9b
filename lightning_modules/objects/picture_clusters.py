"""Clusters of one vector a picture: principal components, whitened, and k-means; kept in the checkpoint.

Source: the evaluation of MaskContrast (Van Gansbeke et al., ICCV 2021). R pictures, D dimension, K clusters.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from common import distributed
from common.precision import exact
from retrieval import kmeans
from retrieval.whitening import principal

log = logging.getLogger(__name__)


class PictureClusters(nn.Module):
    """Buffers `mean` [D], `axes` [D,D], `centroids` [K,D] and `fitted`; before a fit every vector is in cluster 0."""

    mean: Tensor
    axes: Tensor
    centroids: Tensor
    fitted: Tensor

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("axes", torch.zeros(dim, dim))
        self.register_buffer("centroids", torch.zeros(count, dim))
        self.register_buffer("fitted", torch.tensor(False))

    def points(self, vectors: Tensor) -> Tensor:
        """Vectors [R,D] along the principal axes, each divided by its deviation: float32 [R,D]."""
        with exact(vectors.device):
            return (vectors.float() - self.mean) @ self.axes.T

    @torch.no_grad()
    def fit(self, vectors: Tensor, settings: Any, seed: int) -> None:
        """Fit to vectors [R,D], the same on every rank. settings: `components`, `empty`, `restarts` and `iterations`.

        Zero vectors (pictures without an object) count with `empty=keep`, as released. Where there are fewer than K,
        one class stays, and a line says so.
        """
        if settings.empty == "skip":
            vectors = vectors[vectors.any(1)]
        self.centroids.zero_()
        if len(vectors) < len(self.centroids):
            log.warning(
                "%d pictures show an object, for %d clusters of objects: all of them are one cluster",
                len(vectors), len(self.centroids),
            )  # fmt: skip
        else:
            mean, axes = principal(vectors, min(settings.components, vectors.shape[1]))
            self.mean.copy_(mean)
            self.axes.zero_()[: len(axes)] = axes
            found = kmeans.fit(
                self.points(vectors),
                len(self.centroids),
                spherical=False,
                seed=seed,
                iterations=settings.iterations,
                restarts=settings.restarts,
            )
            self.centroids.copy_(found.centroids)
        for part in (self.mean, self.axes, self.centroids):
            part.copy_(distributed.broadcast(part))  # engines may differ in the last bit between devices
        self.fitted.fill_(True)

    def assign(self, vectors: Tensor) -> Tensor:
        """The cluster of each vector [R,D], from 0: int64 [R]."""
        return (self.points(vectors)[:, None] - self.centroids).square().sum(2).argmin(1)
