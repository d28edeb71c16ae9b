"""MaskCut: several objects of a picture, one normalised cut after another (Wang et al., CutLER, CVPR 2023).

Each cut is TokenCut's; then the patches of the object are blanked out, so that they are joined to nothing, and the
picture is cut again. Nothing here has a gradient.

Glossary: B pictures, h x w patches, N = h w nodes, C channels, n masks of a picture.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError, one_of
from grouping import eigen, masks, spectral

ORIENTATIONS = ("peak_then_corners", "released")
"""Which half of a cut is the object. Both test the half above the mean: with three or four of the picture's corners in
it, or without the entry of largest magnitude, the other half is taken. `peak_then_corners` first gives the vector the
sign that makes its largest entry positive, so the result is the same for both signs. `released` takes the sign that a
solver happens to give, here the one of fewer positive entries: a half that is turned for its missing peak then keeps
all its corners."""
REJECTIONS = ("stop", "released")
"""After a mask that is rejected: no further one is looked for, or the same picture is cut again, as released. Nothing
has been blanked out by then, so the very same mask is found, compared with the empty one before it, and accepted."""
CORNERS = 3
"""Corners of the picture from which a half is the background."""


@dataclass(frozen=True)
class Halves:
    """Cuts of B eigenvectors with the object's half chosen."""

    corners: Tensor
    """int64 [B]: corners of the picture above the mean."""
    turned: Tensor
    """bool [B]: the half below the mean is the object's."""
    seeds: Tensor
    """int64 [B]: flat index of the vector's extreme in the object's half."""
    foreground: Tensor
    """bool [B,h,w]: the object's half."""
    components: Tensor
    """bool [B,h,w]: the 4-connected part of it that holds the seed."""


@dataclass(frozen=True)
class MaskCuts:
    """MaskCut of B pictures; after a picture has stopped its entries are empty, seeds -1."""

    masks: Tensor
    """bool [B,n,h,w]: what is kept of each mask, without the patches of earlier ones; empty where it is rejected."""
    accepted: Tensor
    """bool [B,n]. The first mask always is. An accepted one may be empty, where earlier ones have all its patches."""
    candidates: Tensor
    """bool [B,n,h,w]: the component of every cut, before it is judged."""
    overlaps: Tensor
    """[B,n]: intersection over union with the mask before, 0 where that was rejected; NaN for the first."""
    areas: Tensor
    """[B,n]: a candidate's share of the picture."""
    paintings: Tensor
    """bool [B,n,h,w]: patches that were blanked out before each cut."""
    vectors: Tensor
    """[B,n,h,w]: second eigenvectors."""
    foregrounds: Tensor
    """bool [B,n,h,w]: the object's half of each cut."""
    seeds: Tensor
    """int64 [B,n]: flat index, see `Halves`."""


def halves(vectors: Tensor, orient: str = "peak_then_corners") -> Halves:
    """The object's half of second eigenvectors [B,h,w], see ORIENTATIONS."""
    one_of("maskcut.orient", orient, ORIENTATIONS)
    size = vectors.shape[-2:]
    rows = vectors.flatten(1)
    if orient == "peak_then_corners":
        rows = eigen.oriented(rows, "peak")
    above = rows > rows.mean(1, keepdim=True)
    maps = above.unflatten(1, size)
    corners = maps[:, [0, 0, -1, -1], [0, -1, 0, -1]].sum(1)
    peak = above.gather(1, rows.abs().argmax(1, keepdim=True))[:, 0]
    turned = (corners >= CORNERS) | ~peak
    seeds = torch.where(turned[:, None], -rows, rows).argmax(1)
    foreground = maps ^ turned[:, None, None]
    parts = [masks.component_at(half, int(seed), 4) for half, seed in zip(foreground, seeds, strict=True)]
    return Halves(corners, turned, seeds, foreground, torch.stack(parts) if parts else foreground)


def blank(features: Tensor, painting: Tensor) -> Tensor:
    """Features [B,N,C] with zeros at the painted patches bool [B,N]: what an affinity of blanked patches is made of."""
    return features.masked_fill(painting[:, :, None], 0)


def blank_affinity(affinity: Tensor, painting: Tensor, eps: float) -> None:
    """The affinity [B,N,N] of `blank`ed features out of that of the features themselves, in place: eps at every pair
    with a painted patch, a patch with itself included; no cosine is formed again."""
    for weights, painted in zip(affinity, painting, strict=True):
        places = painted.nonzero()[:, 0]
        weights[places] = eps
        weights[:, places] = eps


def merged_overlap(one: Tensor, two: Tensor) -> Tensor:
    """Intersection over union of masks bool [B,h,w], pair by pair: float32 [B]; 0 where both are empty."""
    common = (one & two).sum((1, 2))
    return common / (one | two).sum((1, 2)).clamp(min=1)


@torch.no_grad()
def mask_cut(
    features: Tensor,
    size: tuple[int, int],
    *,
    count: int = 3,
    tau: float = 0.15,
    eps: float = 1e-5,
    on_reject: str = "stop",
    orient: str = "peak_then_corners",
    overlap: float = 0.5,
    smallest: float = 0.01,
    solver: str = "auto",
) -> MaskCuts:
    """Up to `count` masks of each picture, detached.

    Args:
        features: [B,N,C], of patches in raster order.
        size: h and w of the grid, of any ratio.
        tau, eps: see `spectral.threshold_affinity`; tau at least 0, so that a blanked patch is joined to nothing.
        on_reject, orient: see REJECTIONS and ORIENTATIONS.
        overlap: a mask that overlaps the one before it by more is rejected.
        smallest: and one that covers no more than this share of the picture; neither rule is asked of the first mask.
        solver: see `eigen.SOLVERS`.

    Raises:
        ConfigError: a grid of fewer than 3 patches, a negative tau or an unknown word.
        LabelfreeError: features that are not finite.
    """
    one_of("maskcut.on_reject", on_reject, REJECTIONS)
    one_of("maskcut.orient", orient, ORIENTATIONS)
    if tau < 0:
        raise ConfigError(f"maskcut.tau={tau}: patches that are blanked out would be joined to all; use 0 or more")
    affinity = spectral.threshold_affinity(features, tau, eps)
    pictures, nodes = affinity.shape[:2]

    def empty(value: float | bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full((pictures, count, *shape), value, dtype=dtype, device=affinity.device)

    found = MaskCuts(
        *(empty(False, *size), empty(False), empty(False, *size), empty(torch.nan), empty(0.0), empty(False, *size)),
        *(empty(0.0, *size, dtype=affinity.dtype), empty(False, *size), empty(-1, dtype=torch.int64)),
    )
    painting = torch.zeros(pictures, *size, dtype=torch.bool, device=affinity.device)
    before = painting.clone()
    going = torch.arange(pictures, device=affinity.device)
    sign = "peak" if orient == "peak_then_corners" else "minority"
    for number in range(count):
        if not len(going):
            break
        weights = affinity if len(going) == pictures else affinity[going]
        vectors = eigen.oriented(_second(weights, painting[going], size, solver), sign).unflatten(1, size)
        cut = halves(vectors, orient)
        areas = cut.components.sum((1, 2)) / nodes
        accepted = torch.ones_like(cut.turned)
        if number:
            found.overlaps[going, number] = shared = merged_overlap(before[going], cut.components)
            accepted = (shared <= overlap) & (areas > smallest)
        own = cut.components & accepted[:, None, None]
        found.paintings[going, number] = painting[going]
        found.masks[going, number] = own & ~found.masks[going, :number].any(1)
        found.accepted[going, number], found.areas[going, number] = accepted, areas.to(found.areas)
        found.candidates[going, number], found.foregrounds[going, number] = cut.components, cut.foreground
        found.vectors[going, number], found.seeds[going, number] = vectors, cut.seeds
        before[going], painting[going] = own, painting[going] | own
        going = going[accepted] if on_reject == "stop" else going
        if number + 1 < count:
            blank_affinity(affinity, before.flatten(1), eps)
    return found


def _second(affinity: Tensor, painting: Tensor, size: tuple[int, int], solver: str) -> Tensor:
    """Second eigenvectors [B,N] of graphs with blanked patches bool [B,h,w].

    A blanked patch has the same weight to all, so its entry is the mean of the vector divided by 1 - l. Its degree is
    so small that a solver's error would be largest there, and all these patches stand on the threshold's one side.
    """
    values, vectors = spectral.second_vectors(affinity, size, solver)
    painted = painting.flatten(1)
    nodes = painted.shape[1]
    rest = vectors.masked_fill(painted, 0).sum(1)
    inside = nodes * (1 - values[:, 0]) - painted.sum(1)
    sure = inside.abs() > 1e-3 * nodes  # else the vector is about blanked patches alone
    return torch.where(painted & sure[:, None], (rest / inside)[:, None], vectors)
