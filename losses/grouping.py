"""Goodness of grouping of HSG (CVPR 2022): are the groups of a picture's segments compact, balanced and distinctive?

As in the release, twke18/HSG. The modularity differs from DMoN (Tsitsulin et al., 2020): its total degree counts
twice, and the null model has out-degrees alone. Shapes: B pictures, K groups, M nodes, d dimension.
"""

import torch
from torch import Tensor

from common.precision import real
from losses.vmf import vmf


def modularity(memberships: Tensor, graph: Tensor, padding: Tensor) -> Tensor:
    """1 - [tr(S'AS) - |S'd|^2 / (2T)] / (2T), a mean over the pictures that have arcs; a scalar.

    S = memberships [B,K,M] without padding, A = graph [B,M,M] (a constant), d its out-degrees, T their sum; padding
    bool [B,M], true where a slot holds no node. Computed in float32 (float64 for float64 memberships).
    """
    members = _valid(memberships, padding)
    graph = graph.detach().to(members.dtype)
    degrees = graph.sum(2)
    total = 2 * degrees.sum(1)
    with torch.autocast(members.device.type, enabled=False):
        inside = ((members @ graph) * members).sum((1, 2))
        expected = (members @ degrees[:, :, None]).square().sum((1, 2))
    known = total > 0
    total = total.where(known, 1.0)
    return _mean(1 - (inside - expected / total) / total, known)


def collapse(memberships: Tensor, padding: Tensor, *, slots: bool = False) -> Tensor:
    """sqrt(K) |sum over nodes of S_i| / n, a mean over the pictures that have nodes; 1 where groups are balanced.

    memberships [B,K,M], padding bool [B,M]. n is the number of nodes of the picture; with `slots` it is M, padding
    included, as released: the term then weighs less the more padding there is.
    """
    members = _valid(memberships, padding)
    nodes = (~padding).sum(1).to(members.dtype)
    known = nodes > 0
    count = torch.full_like(nodes, padding.shape[1]) if slots else nodes.where(known, 1.0)
    # An empty picture has sum 0, where the norm has no gradient.
    sums = members.sum(2) + (~known[:, None]).to(members.dtype)
    return _mean(members.shape[1] ** 0.5 * torch.linalg.vector_norm(sums, dim=1) / count, known)


def centroid_contrast(
    centroids: Tensor,
    kappa: float,
    against: Tensor | None = None,
    first: int = 0,
    known: Tensor | None = None,
    present: Tensor | None = None,
) -> Tensor:
    """Mean over centroids of minus log softmax of kappa times the cosine to all centroids, at the own one; a scalar.

    Args:
        centroids: [n,d] of all pictures of this rank, any length; gradient reaches them on both sides.
        kappa: concentration.
        against: [N,d] of all ranks, gathered with gradient; None: `centroids`.
        first: the row of `against` where this rank's centroids begin.
        known, present: bool [n] and [N], false for centroids of pictures without a node, which take no part.
    """
    unit = torch.nn.functional.normalize(real(centroids), dim=1)
    others = unit if against is None else torch.nn.functional.normalize(real(against), dim=1)
    own = torch.arange(len(unit), device=unit.device) + first
    return vmf(unit, others, own if known is None else own.where(known, -1), kappa, present=present)


def _valid(memberships: Tensor, padding: Tensor) -> Tensor:
    return real(memberships).masked_fill(padding[:, None, :], 0.0)


def _mean(values: Tensor, known: Tensor) -> Tensor:
    return values.where(known, 0.0).sum() / known.sum().clamp(min=1)
