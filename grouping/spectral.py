"""Graph cuts of pictures: affinities of patches, and regions and objects from the eigenvectors of their graphs.

A graph has a node for each patch, in raster order; `eigen.smallest` solves it. Nothing here has a gradient.

Glossary: B pictures, h x w patches, N = h w nodes, C channels, k eigenvectors, n segments of a picture.
Sources: Shi and Malik, Normalized Cuts (PAMI 2000); Wang et al., TokenCut (CVPR 2022); Melas-Kyriazi et al., Deep
Spectral Methods (CVPR 2022).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common import chance
from common.errors import ConfigError, LabelfreeError
from common.precision import exact, real
from grouping import eigen, masks
from retrieval import kmeans

COLOUR_GRAPHS = ((20, 2.0), (10, 0.1))
"""(neighbours, weight of the place) of the two colour graphs of Deep Spectral."""
_STRIP = 256
"""Rows of a graph that a CPU makes at a time, from the diagonal on; other devices make them all at once."""
SIDES = ("peak", "border")
"""Of a cut that is the object: the one of the vector's largest entry, as released, or the one with the smaller share of
the picture's border; of equal shares the former."""
_SEPARATION = 1e-3
"""Largest sine of the angle between TokenCut's vector and the true one, by residual and gap, before it is solved
densely."""


def centred(maps: Tensor) -> Tensor:
    """Unit features of patches [B,C,h,w] less their mean over the picture.

    Features of a network lie in a narrow cone, so all cosines of a picture are high and its graph hardly tells patches
    apart; around the mean, half of them are negative.
    """
    unit = F.normalize(maps, dim=1)
    return unit - unit.mean((2, 3), keepdim=True)


# Affinities, float32 [B,N,N] (float64 for float64 features), symmetric. Each raises LabelfreeError for features that
# are not finite: a threshold would hide them.


@torch.no_grad()
def feature_affinity(features: Tensor, *, normalize: bool = True, nonnegative: bool = True) -> Tensor:
    """Products of the patches' features [B,N,C], divided by the largest of a picture.

    normalize: unit features, so products are cosines. nonnegative: negative products are 0; else the graph has negative
    weights, see `eigen.NEAREST`.
    """
    rows = _finite(features)
    rows = F.normalize(rows, dim=2) if normalize else rows
    weights = _products(rows, lambda strip: strip.clamp_(min=0) if nonnegative else strip)
    return weights.div_(weights.amax((1, 2), keepdim=True).clamp_(min=torch.finfo(weights.dtype).tiny))


@torch.no_grad()
def threshold_affinity(features: Tensor, tau: float = 0.2, eps: float = 1e-5, binary: bool = True) -> Tensor:
    """TokenCut's graph of features [B,N,C]: 1 where the cosine is above tau, else eps.

    binary False: cosines, those below tau being eps.
    """
    rows = F.normalize(_finite(features), dim=2)
    if binary:
        return _products(rows, lambda strip: strip.gt_(tau).clamp_(min=eps))
    return _products(rows, lambda strip: strip.masked_fill_(strip < tau, eps))


def _products(rows: Tensor, weigh: Callable[[Tensor], Tensor]) -> Tensor:
    """What `weigh` makes, in place, of the products of rows [B,N,C] with each other: [B,N,N], symmetric but for
    rounding.

    A CPU makes one half, in strips that stay in its cache, and mirrors it.
    """
    count, nodes = rows.shape[:2]
    height = _STRIP if rows.device.type == "cpu" else max(1, nodes)
    weights = rows.new_empty(count, nodes, nodes)
    with exact(rows.device):
        for first in range(0, nodes, height):
            here, below = slice(first, first + height), slice(first + height, nodes)
            strip = weights[:, here, first:]
            torch.bmm(rows[:, here], rows[:, first:].mT, out=strip)
            weigh(strip)
            weights[:, below, here] = weights[:, here, below].mT
    return weights


@torch.no_grad()
def colour_affinity(pictures: Tensor, graphs: tuple[tuple[int, float], ...] = COLOUR_GRAPHS) -> Tensor:
    """How often two pixels are neighbours in colour and place: whole numbers, pictures [B,3,h,w] in 0..1.

    For each (neighbours, weight) a pixel is (r, g, b, weight x, weight y), x and y from 0 to 1 with both ends; it and
    its nearest ones, itself included, are joined: every arc adds 1 in both directions, so two graphs give 0 to 4. Of
    neighbours at equal distance any may be taken.
    """
    pictures = _finite(pictures)
    count, _, height, width = pictures.shape
    nodes = height * width
    axes = [torch.linspace(0, 1, side, dtype=pictures.dtype, device=pictures.device) for side in (height, width)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1).expand(count, -1, -1)
    weights = pictures.new_zeros(count, nodes, nodes)
    for neighbours, scale in graphs:
        points = torch.cat([pictures.flatten(2).mT, scale * places], dim=2)
        distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        nearest = distances.topk(min(neighbours, nodes), dim=2, largest=False).indices
        arcs = torch.zeros_like(weights).scatter_(2, nearest, 1.0)
        weights += arcs + arcs.mT
    return weights


@torch.no_grad()
def gaussian_affinity(maps: Tensor, sigma_features: float, sigma_places: float, radius: float) -> Tensor:
    """Weights of the classical normalised cut: maps [B,C,h,w] of colours or features, as they are.

    exp(-|f_i - f_j|^2 / sigma_features) exp(-|x_i - x_j|^2 / sigma_places) where places, in pixels of the map, are less
    than `radius` apart, else 0.
    """
    maps = _finite(maps)
    axes = [torch.arange(side, dtype=maps.dtype, device=maps.device) for side in maps.shape[-2:]]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    rows = maps.flatten(2).mT
    near = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")
    with exact(rows.device):
        apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    weights = (-apart.square() / sigma_features - near.square() / sigma_places).exp()
    return weights * (near < radius)


def _finite(features: Tensor) -> Tensor:
    """Features of pictures [B,...], detached, float32 or float64."""
    features = real(features.detach())
    broken = ~features.flatten(1).isfinite().all(1)
    if bool(broken.any()):
        raise LabelfreeError(
            f"affinity: the features of picture {int(broken.int().argmax())} of {len(features)} of the batch are not "
            "finite; look for a picture or a precision that gives such features"
        )
    return features


def upsampled(features: Tensor, size: tuple[int, int], unit: bool = True) -> Tensor:
    """Feature maps [B,C,h,w] on a grid of another size, bilinear, for an affinity finer than the patches: [B,C,H,W].

    unit: made unit vectors before; they are not after, and Deep Spectral takes them as they then are.
    """
    maps = real(features)
    maps = F.normalize(maps, dim=1) if unit else maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


# Regions of Deep Spectral.


def adaptive_count(values: Tensor) -> int:
    """Segments of a picture by the largest gap of its eigenvalues [k], ascending, the first gap left out; k >= 3."""
    if len(values) < 3:
        raise ConfigError(f"spectral.k={len(values)}: the gap of eigenvalues needs at least 3; raise spectral.k")
    return int(values.diff()[1:].argmax()) + 2


def multi_region(vectors: Tensor, count: int, *, seed: int, index: int, restarts: int = 10) -> Tensor:
    """Segments of one picture: k-means of its patches in the eigenvectors, the background being 0; int64 [h,w].

    Args:
        vectors: [k,h,w], the first (constant) one included; it is not used. As they are: not scaled, no row normalised.
        count: n, segments; fewer where the picture has fewer patches.
        seed, index: key of the starts of k-means, with the picture's index in its data set.
        restarts: runs of k-means, the best of which counts.

    Raises:
        ConfigError: fewer than two eigenvectors.
    """
    if len(vectors) < 2:
        raise ConfigError(f"spectral.k={len(vectors)}: segments need at least 2 eigenvectors; raise spectral.k")
    points = vectors[1:].flatten(1).T
    settings = {"spherical": False, "iterations": 300, "restarts": restarts}
    key = chance.key(seed, "segments", index)
    found = kmeans.fit(points, min(count, len(points)), seed=key, **settings)
    labels = kmeans.assign(points.float(), found.centroids, spherical=False)
    return masks.background_first(labels.view(vectors.shape[-2:]))


def foreground(vector: Tensor) -> Tensor:
    """The object side of an eigenvector [h,w] for localisation: where it is positive; the other side where that is more
    than half of the picture but not all, or nothing. bool [h,w]."""
    mask = vector > 0
    share = float(mask.double().mean())
    return ~mask if 0.5 < share < 1 or share == 0 else mask


def localise(vector: Tensor, patch: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Object of a picture by its second eigenvector [h,w]: mask bool [h,w] and box int64 [4] in pixels.

    The largest 8-connected component of `foreground`. size: height and width of the picture, to which boxes are
    clipped.
    """
    mask = masks.largest_component(foreground(vector), 8)
    return mask, masks.tight_box(mask, patch, size)


@dataclass(frozen=True)
class RegionSpace:
    """Where the regions of a data set were clustered, for regions that come later. No gradient."""

    mean: Tensor
    """[D], taken off unit vectors; zero without principal components."""
    axes: Tensor
    """[D,components], or [D,0] where vectors stay as they are."""
    centroids: Tensor
    """[K,D] or [K,components]."""

    def points(self, vectors: Tensor) -> Tensor:
        """Features of regions [R,D] in the space: float32."""
        points = (F.normalize(real(vectors.detach()), dim=1) - self.mean).float()
        if not self.axes.shape[1]:
            return points
        with exact(points.device):
            return points @ self.axes

    def assign(self, vectors: Tensor) -> Tensor:
        """The nearest cluster of each region [R,D]: int64 [R], from 0."""
        return kmeans.assign(self.points(vectors), self.centroids, spherical=False)


@torch.no_grad()
def region_space(vectors: Tensor, count: int, *, seed: int, components: int = 0) -> RegionSpace:
    """k-means in `count` clusters of the regions of a whole data set by their features [R,D].

    Unit vectors, `components` principal components of them (0: all as they are), k-means.

    Raises:
        ConfigError: fewer regions than clusters, or more components than there can be.
    """
    points = F.normalize(real(vectors.detach()), dim=1)
    mean, axes = points.new_zeros(points.shape[1]), points.new_zeros(points.shape[1], 0)
    if components:
        if components > min(points.shape):
            raise ConfigError(
                f"method.regions.pca={components}: {points.shape[0]} regions of {points.shape[1]} channels have "
                f"{min(points.shape)} components; lower it"
            )
        mean = points.mean(0)
        points = points - mean
        _, axes = torch.linalg.eigh((points.double().mT @ points.double()) / len(points))
        axes = axes.flip(1)[:, :components].to(points.dtype).contiguous()
        with exact(points.device):
            points = points @ axes
    found = kmeans.fit(points, count, spherical=False, seed=seed, iterations=100)
    return RegionSpace(mean.float(), axes.float(), found.centroids)


def region_classes(
    vectors: Tensor, count: int, *, seed: int, components: int = 0, reserve_background: bool = True
) -> Tensor:
    """Classes of the regions of a whole data set by their features [R,D]: int64 [R]; see `region_space`.

    reserve_background: classes are 1..count and 0 is left to the background; False, as released: 0..count-1, so that
    one class falls together with the background.
    """
    labels = region_space(vectors, count, seed=seed, components=components).assign(vectors)
    return labels + 1 if reserve_background else labels


def paint(segments: Tensor, names: Tensor, classes: Tensor) -> Tensor:
    """A map of segments int64 [h,w] with the class of each region: 0 stays 0; names and classes int64 [R]."""
    table = torch.zeros(int(segments.max()) + 1, dtype=torch.int64, device=segments.device)
    table[names] = classes
    return table[segments]


# TokenCut.


@dataclass(frozen=True)
class Cut:
    """TokenCut of B pictures."""

    values: Tensor
    """[B,2]: the second and third eigenvalue."""
    vectors: Tensor
    """[B,h,w], positive at the seed's side: the seed is on the object's side of the mean."""
    bipartition: Tensor
    """bool [B,h,w]: entries above their mean, or the others, so that the seed is inside."""
    seeds: Tensor
    """int64 [B]: flat index of the entry of largest magnitude, with side `border` of that inside the object's side."""
    masks: Tensor
    """bool [B,h,w]: the 4-connected component of the bipartition that holds the seed."""


@torch.no_grad()
def second_vectors(affinity: Tensor, size: tuple[int, int], solver: str = "auto") -> tuple[Tensor, Tensor]:
    """The second and third eigenvalue [B,2] and the second eigenvector [B,N], its peak positive, of graphs [B,N,N].

    A picture whose vector is not sure, since the third value lies too near for float32, is solved densely.

    Raises:
        ConfigError: a grid of fewer than 3 patches.
    """
    if affinity.shape[-1] < 3:
        raise ConfigError(
            f"a grid of {size[0]} x {size[1]} patches: a cut needs 3 patches; give larger pictures or another patch"
        )
    found = eigen.smallest(affinity, 3, sign="peak", solver=solver, tolerance=3e-6)
    values, vectors = found.values[:, 1:], found.vectors[:, 1]
    gap = values[:, 1] - values[:, 0]
    unsure = (found.residuals[:, 1] > _SEPARATION * gap) & ~found.dense
    if bool(unsure.any()):
        again = eigen.smallest(affinity[unsure], 3, sign="peak", solver="dense")
        values[unsure], vectors[unsure] = again.values[:, 1:], again.vectors[:, 1]
    return values, vectors


@torch.no_grad()
def token_cut(affinity: Tensor, size: tuple[int, int], *, solver: str = "auto", side: str = "peak") -> Cut:
    """One object of each picture by its normalised cut; the result does not depend on the solver's sign.

    A picture whose second vector is not sure, since the third value lies too near for float32, is solved densely.

    Args:
        affinity: [B,N,N], see `threshold_affinity`.
        size: h and w of the grid.
        solver: see `eigen.SOLVERS`.
        side: see SIDES.

    Raises:
        ConfigError: a grid of fewer than 3 patches.
        LabelfreeError: features that are not finite.
    """
    values, vectors = second_vectors(affinity, size, solver)
    seeds = vectors.abs().argmax(1)
    above = vectors > vectors.mean(1, keepdim=True)
    inside = above.gather(1, seeds[:, None])
    vectors, above = torch.where(inside, vectors, -vectors), torch.where(inside, above, ~above)
    above = above.view(-1, *size)
    if side == "border":
        turned = border_share(above) > border_share(~above)
        above = torch.where(turned[:, None, None], ~above, above)
        vectors = torch.where(turned[:, None], -vectors, vectors)
        away = (vectors - vectors.mean(1, keepdim=True)).masked_fill(~above.flatten(1), -torch.inf)
        seeds = torch.where(turned, away.argmax(1), seeds)
    objects = [masks.component_at(mask, int(seed), 4) for mask, seed in zip(above, seeds, strict=True)]
    return Cut(values, vectors.view(-1, *size), above, seeds, torch.stack(objects))


def border_share(maps: Tensor) -> Tensor:
    """How much of the border of each map bool [B,h,w] is inside it: [B], from 0 to 1."""
    rim = torch.ones_like(maps[0])
    rim[1:-1, 1:-1] = False
    return maps[:, rim].double().mean(1)
