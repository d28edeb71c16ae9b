"""The directions of patch features that tell where a patch lies, and features without them. Two ways.

Blank basis (INSID3, CVPR 2026, arXiv 2603.28480; visinf/INSID3): what a network says of a black picture can only be of
places, so the directions in which its features vary there are taken out of all features.

RASA (Franca, arXiv 2507.14137; valeoai/Franca): a linear map is fitted that tells a patch's row and column from its
features, the plane of its two rows is taken out, and so on with what is left.

Shapes: B pictures, h x w patches, N = h w patches row by row, C channels, k directions, L planes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import exact

EPS = 1e-12
ENERGY = 0.95
"""Share of the energy of the black picture's features that the directions hold, where their number is not given."""
SHARE = 16
"""They are at most C / SHARE then: many directions of C destroy what features know."""


def blank_basis(maps: Tensor, components: int | None = None) -> Tensor:
    """Orthonormal directions [C,k] of the places, of features [C,h,w] of a black picture; float32.

    components: k. None: the fewest with ENERGY of the energy, C / SHARE at most; k is C / SHARE then, and the columns
    beyond are zero.
    """
    with exact(maps.device):
        unit = F.normalize(maps.flatten(1).float(), dim=0, eps=EPS)
        vectors, values, _ = torch.linalg.svd(unit - unit.mean(1, keepdim=True), full_matrices=False)
        if components is not None:
            return vectors[:, :components]
        most = max(1, len(vectors) // SHARE)
        before = values.square().cumsum(0) - values.square()  # of the columns before each
        needed = before[:most] < ENERGY * values.square().sum()
        return vectors[:, :most] * needed


def without(maps: Tensor, basis: Tensor) -> Tensor:
    """Unit features [B,C,h,w] without the directions [C,k], at unit length again; float32."""
    with exact(maps.device):
        unit = F.normalize(maps.float(), dim=1, eps=EPS).flatten(2)
        left = unit - basis @ (basis.T @ unit)
        return F.normalize(left, dim=1, eps=EPS).unflatten(2, maps.shape[2:])


def orthonormal(pair: Tensor) -> Tensor:
    """Two directions [2,C] that span the plane of a pair, row direction first."""
    row = F.normalize(pair[0], dim=0, eps=EPS)
    column = pair[1] - (pair[1] @ row) * row
    return torch.stack([row, F.normalize(column, dim=0, eps=EPS)])


def on_plane(patches: Tensor, pair: Tensor) -> Tensor:
    """The part of patches [...,C] that lies in the plane of a pair [2,C]."""
    axes = orthonormal(pair)
    return patches @ axes.T @ axes


def without_planes(patches: Tensor, planes: Tensor) -> Tensor:
    """Patches [...,C] without the planes of pairs [L,2,C], one after the other."""
    for pair in planes:
        patches = patches - on_plane(patches, pair)
    return patches


def coordinates(height: int, width: int) -> Tensor:
    """Row and column of each patch, from 0 to 1: float32 [N,2]."""
    sides = [torch.arange(side) / max(1, side - 1) for side in (height, width)]
    return torch.stack(torch.meshgrid(*sides, indexing="ij"), dim=-1).flatten(0, 1)


def position_loss(patches: Tensor, pair: Tensor, places: Tensor) -> Tensor:
    """How badly a pair [2,C] tells the `coordinates` [N,2] of patches [...,N,C]: mean squared error of the sigmoid."""
    return F.mse_loss((patches @ pair.T).sigmoid(), places.expand(*patches.shape[:-1], 2))


def fitted_planes(patches: Tensor, places: Tensor, count: int, iterations: int = 50) -> Tensor:
    """`count` pairs float32 [count,2,C] for patches [R,C] at `coordinates` [R,2], each fitted to what those before it
    leave; no chance in it.

    Each minimises `position_loss` with all patches at once (L-BFGS), where the release takes steps on batches.
    """
    left, planes = patches.double(), []
    scale = left.square().sum(1).mean().sqrt().clamp(min=EPS)  # pairs of unit size whatever the features' length
    left, places = left / scale, places.double()
    for _ in range(count):
        pair = left.new_zeros(2, left.shape[1]).requires_grad_()
        search = torch.optim.LBFGS([pair], max_iter=iterations, line_search_fn="strong_wolfe")

        def loss(pair: Tensor = pair, search: torch.optim.LBFGS = search, left: Tensor = left) -> Tensor:
            search.zero_grad()
            found = position_loss(left, pair, places)
            found.backward()
            return found

        with torch.enable_grad():
            search.step(loss)
        planes.append(pair.detach())
        left = without_planes(left, pair.detach()[None])
    return torch.stack(planes).float()


def told(patches: Tensor, places: Tensor) -> float:
    """R2 of the best linear map from unit patches [R,C] to `coordinates` [R,2] (with a constant): 1 where it tells
    them, 0 where the mean place does as well; with fewer patches than channels always 1."""
    unit, places = F.normalize(patches.double(), dim=1), places.double()
    unit, gaps = unit - unit.mean(0), places - places.mean(0)
    # what rounding leaves of a direction that was taken out is still a copy of it, so what is that small does not count
    found = torch.linalg.lstsq(unit.cpu(), gaps.cpu(), rcond=1e-4, driver="gelsd").solution
    left = (gaps.cpu() - unit.cpu() @ found).square().sum()
    return float(1 - left / gaps.square().sum().cpu().clamp(min=EPS))
