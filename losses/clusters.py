"""Classification of cells into clusters that k-means found: labels, class weights and the losses of PiCIE and MDC.

Sources: PiCIE and MDC (Cho et al., CVPR 2021, code of June 2023); balanced sampling: DeepCluster (Caron et al., ECCV
2018). Maps of codes are of unit length along their channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed
from common.precision import exact, real


def products(codes: Tensor, rows: Tensor) -> Tensor:
    """f.w of codes [B,D,h,w] and rows [K,D]: [B,K,h,w], float32 whatever autocast says."""
    with exact(codes.device):
        return torch.matmul(real(rows), real(codes).flatten(2)).unflatten(2, codes.shape[2:])


def similarities(codes: Tensor, centroids: Tensor) -> Tensor:
    """-|f - c|^2 of unit codes [B,D,h,w] and centroids [K,D] of any length, as -(1 - 2 f.c + |c|^2): [B,K,h,w]."""
    return 2 * products(codes, centroids) - centroids.square().sum(1)[:, None, None] - 1


def nearest_centroids(codes: Tensor, centroids: Tensor) -> Tensor:
    """The cluster of every cell by Euclidean distance, the lowest of equals: [B,D,h,w] -> int64 [B,h,w]."""
    return similarities(codes.detach(), centroids).argmax(1)


def logits(codes: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """f.w (+ b): [B,D,h,w], [K,D] -> [B,K,h,w]. float32; neither temperature nor normalisation of the weights."""
    found = products(codes, weight)
    return found if bias is None else found + bias[:, None, None]


def class_weights(counts: Tensor, mode: str) -> Tensor:
    """Weights of the cross-entropy from the number of cells of each cluster: float32 [K].

    `proportional`: a cluster's share of all cells, as released, so that large clusters count more and an empty one 0.
    `none`: 1. `inverse`: 1 / share, averaging 1 over the cells; 0 for an empty cluster.
    """
    if mode == "none":
        return torch.ones_like(counts, dtype=torch.float32)
    shares = counts.double() / counts.sum().clamp(min=1)
    if mode == "proportional":
        return shares.float()
    filled = shares > 0
    return torch.where(filled, 1 / (shares.clamp(min=1e-12) * filled.sum().clamp(min=1)), 0.0).float()


def weighted_cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """sum w_y l / sum w_y over the cells of the global batch; logits [B,K,h,w], labels [B,h,w], weight [K].

    Each rank divides its sum by the weights of all ranks and multiplies it by their number, so that the mean of the
    losses and gradients of all is that of one process. 0 where no cell has a weight. A collective.
    """
    summed = F.cross_entropy(real(logits), labels, weight, reduction="sum")
    divisor = distributed.mean(weight[labels].sum())
    return summed / torch.where(divisor > 0, divisor, torch.ones_like(divisor))


@dataclass(frozen=True)
class Targets:
    """What a view's cells are classified into: centroids [K,D], labels int64 [B,h,w], class weights [K]."""

    centroids: Tensor
    labels: Tensor
    weight: Tensor


@dataclass(frozen=True)
class CrossViews:
    """Losses of two views: `terms[i][j]` is that of the codes of view i with the clusters and labels of view j."""

    terms: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]

    @property
    def within(self) -> Tensor:
        """Mean of the losses of each view with its own clusters."""
        return (self.terms[0][0] + self.terms[1][1]) / 2

    @property
    def across(self) -> Tensor:
        """Mean of the losses of each view with the clusters of the other."""
        return (self.terms[0][1] + self.terms[1][0]) / 2

    @property
    def total(self) -> Tensor:
        return (self.within + self.across) / 2


def cross_views(codes: Sequence[Tensor], targets: Sequence[Targets]) -> CrossViews:
    """PiCIE's losses of two views of one frame: unit codes [B,D,h,w] of each, and its targets. Gradient reaches the
    codes alone. A collective."""

    def term(own: Tensor, other: Targets) -> Tensor:
        return weighted_cross_entropy(logits(own, other.centroids), other.labels, other.weight)

    first, second = ((term(own, targets[0]), term(own, targets[1])) for own in codes)
    return CrossViews((first, second))


def mean_square(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of two maps of unit codes, over all entries; gradient reaches both."""
    return F.mse_loss(real(first), real(second))


def head_weights(clusters: Sequence[int]) -> list[float]:
    """What the losses of heads with K_i clusters are mixed with: 1 / log K_i, made to sum to 1.

    A cross-entropy is about log K while the network knows nothing, so every head weighs alike. For two heads that is
    log K_2 / (log K_1 + log K_2) and the reverse. Source: PiCIE+H, CVPR 2021.
    """
    logs = torch.tensor([float(k) for k in clusters], dtype=torch.float64).log()
    parts = logs.clamp(min=1e-12).reciprocal()
    return (parts / parts.sum()).tolist()


def sampled_evenly(labels: Tensor, generator: torch.Generator) -> Tensor:
    """As many cells as there are, drawn evenly over the clusters that occur: int64 [B,h,w] -> rows [B*h*w] of the
    flattened labels.

    Of every cluster int(N / occurring) + 1 cells, with replacement where it has no more than that; all are shuffled and
    the first N kept. `generator` is one of the CPU. Source: DeepCluster's sampler of pictures, here of cells.
    """
    flat = labels.flatten().cpu()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat)
    counts = counts[counts > 0]
    wanted = len(flat) // len(counts) + 1
    parts = []
    for own in order.split(counts.tolist()):
        if len(own) <= wanted:
            chosen = torch.randint(len(own), (wanted,), generator=generator)
        else:
            chosen = torch.randperm(len(own), generator=generator)[:wanted]
        parts.append(own[chosen])
    drawn = torch.cat(parts)
    return drawn[torch.randperm(len(drawn), generator=generator)[: len(flat)]].to(labels.device)
