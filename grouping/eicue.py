"""EiCue of EAGLE (CVPR 2024): the first eigenvectors of a graph of a picture's codes and colours. No gradient.

Patches are joined where the products of their codes are large and where their colours are near; in the first
eigenvectors of the graph's Laplacian, without the one of eigenvalue 0, the picture falls into its segments.
Shapes: B pictures, h x w patches, N = h w, D code dimension, k eigenvectors, that of eigenvalue 0 included.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import one_of
from common.precision import real
from grouping import eigen
from grouping.spectral import feature_affinity

SIGMA = 0.1
"""Of the Gaussian over colour distances, in units of the colours."""
COLOURS = ("unit", "released")
"""Colours in 0..1; or normalised ones divided by 255 as released, which makes all colours near alike (every weight
above 0.95): that term damps the graph of codes and tells no colours apart."""
SIGNS = ("vector", "picture")
"""Which sign eigenvectors get: every vector that of `eigen.oriented`, so that its smaller part is positive; or as
released all vectors of a picture together, negated where more than half of their entries are positive."""
_BYTES = 256 << 20
"""Of graphs that are held at once, whole pictures."""


def colours(images: Tensor, normalised: Tensor, size: tuple[int, int], scale: str = "unit") -> Tensor:
    """Colours of the patches [B,3,h,w], bilinear, of pictures [B,3,H,W] in 0..1 and as the backbone sees them."""
    one_of("method.cue.colour", scale, COLOURS)
    chosen = images if scale == "unit" else normalised / 255
    return F.interpolate(real(chosen), size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def colour_affinity(maps: Tensor) -> Tensor:
    """exp(-distance^2 / (2 SIGMA^2)) of the colours [B,3,h,w] of all pairs of patches, [B,N,N]; at most 1."""
    rows = real(maps).flatten(2).mT.contiguous()
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.square_().div_(-2 * SIGMA**2).exp_()


@torch.no_grad()
def affinity(codes: Tensor, coloured: Tensor) -> Tensor:
    """The graph [B,N,N] of codes [B,N,D]: their products, negative ones 0, over the largest of a picture, and the
    colours' `colour_affinity`, both with equal weight."""
    return feature_affinity(codes, normalize=False) + coloured / coloured.amax((1, 2), keepdim=True)


@torch.no_grad()
def vectors(
    views: Sequence[Tensor], coloured: Tensor, k: int, sign: str = "vector", solver: str = "auto"
) -> list[Tensor]:
    """Eigenvectors 2 to k of every picture of each view as maps [B,k-1,h,w], unit length, of the symmetric Laplacian
    D^-1/2 (D - W) D^-1/2.

    Args:
        views: codes [B,D,h,w] each; all views of a picture have the same colours.
        coloured: colours [B,3,h,w].
        sign, solver: see SIGNS and `eigen.SOLVERS`.
    """
    one_of("method.cue.sign", sign, SIGNS)
    size, nodes = coloured.shape[2:], coloured.shape[2] * coloured.shape[3]
    height = max(1, _BYTES // (4 * nodes * nodes * (1 + len(views))))
    parts: list[list[Tensor]] = [[] for _ in views]
    for first in range(0, len(coloured), height):
        rows = slice(first, first + height)
        shared = colour_affinity(coloured[rows])
        for codes, found in zip(views, parts, strict=True):
            graph = affinity(codes[rows].flatten(2).mT, shared)
            found.append(signed(eigenvectors(graph, k, solver), sign)[:, 1:])
    return [torch.cat(found).unflatten(2, size) for found in parts]


def eigenvectors(graph: Tensor, k: int, solver: str = "auto") -> Tensor:
    """The first k of the symmetric Laplacian of a graph [B,N,N], unit rows [B,k,N]; their signs mean nothing."""
    found = eigen.smallest(graph, k, solver=solver)
    return found.vectors * eigen.degrees(graph).sqrt()[:, None]


def signed(rows: Tensor, rule: str = "vector") -> Tensor:
    """Eigenvectors [B,k,N] with the signs of a rule, see SIGNS."""
    if rule == "vector":
        return eigen.oriented(rows)
    share = (rows > 0).to(rows.dtype).mean((1, 2), keepdim=True)
    return torch.where((share > 0.5) & (share < 1), -rows, rows)
