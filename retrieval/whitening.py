"""Features before they are clustered: whitened by PCA as in DeepCluster (Caron et al., ECCV 2018), each number by
itself as in MaskDistill (Van Gansbeke et al., 2022), or standardised and reduced as in Leopart (CVPR 2022)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common import distributed
from common.precision import exact
from retrieval import search

FLAT = 1e-12
"""Share of the largest variance up to which a direction counts as having none."""


def principal(points: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Mean [C] and axes [dim,C] of points [N,C]: the first `dim` principal directions, each divided by the standard
    deviation along it. float32; computed in float64. A direction without variance is a row of zeros; so are those that
    C does not have."""
    rows = points.detach().double()
    mean = rows.mean(0)
    centred = rows - mean
    with exact(points.device):
        covariance = centred.T @ centred / max(1, len(rows))
    return _axes(mean, covariance, dim, whiten=True)


def principal_of_all_ranks(points: Tensor, dim: int, whiten: bool) -> tuple[Tensor, Tensor]:
    """As `principal`, of the points [n,C] of all ranks, from their sums: none is gathered. whiten: false: directions of
    length 1. A collective."""
    rows = points.detach().double()
    count = distributed.total(torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device)).clamp(min=1)
    mean = distributed.total(rows.sum(0)) / count
    centred = rows - mean
    with exact(points.device):
        products = centred.T @ centred
    return _axes(mean, distributed.total(products) / count, dim, whiten)


def _axes(mean: Tensor, covariance: Tensor, dim: int, whiten: bool) -> tuple[Tensor, Tensor]:
    """Mean [C] and axes [dim,C] of a covariance [C,C], float32."""
    with exact(covariance.device):
        values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:dim], vectors.flip(1)[:, :dim]
    there = values > FLAT * values[:1].clamp(min=FLAT)
    scale = torch.where(there, values.clamp(min=FLAT).rsqrt() if whiten else 1.0, 0.0)
    axes = covariance.new_zeros(dim, len(mean))
    axes[: len(values)] = (vectors * scale).T
    return mean.float(), axes.float()


def whitened(points: Tensor, mean: Tensor, axes: Tensor) -> Tensor:
    """Points [...,C] along the axes, as unit vectors [...,dim], float32."""
    with exact(points.device):
        return torch.nn.functional.normalize((points.float() - mean) @ axes.T, dim=-1)


def deviations(points: Tensor) -> Tensor:
    """Standard deviation of every number over points [N,C], of the population; 1 where there is none: [C] float32.

    Points divided by it, and then by their length, are what MaskDistill clusters; their mean is left in.
    """
    spread = points.detach().double().std(0, correction=0)
    return torch.where(spread > 0, spread, 1.0).float()


def scaled(points: Tensor, spread: Tensor) -> Tensor:
    """Points [...,C] divided by `spread` [C], as unit vectors, float32."""
    return torch.nn.functional.normalize(points.float() / spread, dim=-1)


@dataclass(frozen=True)
class Reduction:
    """Points of D numbers standardised, then along their principal directions. No gradient."""

    mean: Tensor
    """[D] float32"""
    spread: Tensor
    """[D] float32: standard deviation of the population, 1 where there is none."""
    axes: Tensor
    """[dim,D] float32, orthonormal rows, the direction of largest variance first."""

    def __call__(self, points: Tensor) -> Tensor:
        """Points [...,D] of any floating type -> [...,dim] float32."""
        with exact(points.device):
            rows = (points.float() - self.mean.to(points.device)) / self.spread.to(points.device)
            return rows @ self.axes.to(points.device).T


@torch.no_grad()
def reduction(points: Tensor, dim: int) -> Reduction:
    """Standardisation and PCA of points [N,D], all of them used; `dim` directions, or fewer where D or N is less.

    PCA is faiss's (its eigenvalues; torch's in float64 where faiss is missing), on the host; a direction's sign is as
    it comes.
    """
    rows = points.detach().float()
    mean, spread = rows.double().mean(0).float(), deviations(rows)
    rows = (rows - mean) / spread
    dim = min(dim, *rows.shape)
    faiss, _ = search.load_faiss()
    if faiss is None:
        with exact(rows.device):
            _, vectors = torch.linalg.eigh(rows.double().T @ rows.double())
        axes = vectors.flip(1)[:, :dim].T.float()
    else:
        found = faiss.PCAMatrix(rows.shape[1], dim)
        found.max_points_per_d = len(rows)  # faiss would take a part of them in silence
        found.train(rows.cpu().numpy())
        axes = torch.from_numpy(faiss.vector_to_array(found.A).reshape(-1, rows.shape[1])[:dim].copy())
    return Reduction(mean.cpu(), spread.cpu(), axes.cpu())
