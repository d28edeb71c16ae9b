"""Segments of pictures: spherical k-means inside every picture of a batch at once, and what is computed over segments.

A segment is a distinct (picture, k-means label, region) triple. The host knows all shapes before it sees a value:
pixels that do not count are marked -1 instead of being cut out, tables of segments have a given number of rows. So
nothing waits for the device, there is no loop over pictures (a CPU takes as many at a time as its cache holds), and a
table that is padded under DDP stays right.

Glossary: B pictures (or crops), N pixels of one, D dimension, K clusters, S rows of a table of segments, G owners.
Source: SegSort (ICCV 2019) section 3; HSG (CVPR 2022).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError, one_of
from common.precision import exact, real

GRIDS = ("linspace", "ceil")
"""Initial grids: `linspace` of the PyTorch release (border cells of half width), `ceil` of the TensorFlow one."""
EMPTY = ("skip", "zero")
"""What an empty cluster does: `skip` is never chosen again (TensorFlow), `zero` is a zero vector that wins against
negative similarities (PyTorch)."""
LOCATIONS = ("centred", "linspace", "relative")
"""Coordinates: linspace 0..1 with both ends, minus 0.5 (PyTorch); without the 0.5; index / size (TensorFlow)."""
ORDERS = ("key", "appearance")
CELL_PIXELS = ("corner", "centre")
"""Which pixel of a map stands for a cell, see `at_cells`."""

_BLOCK_BYTES = 256 << 20
"""Bytes of the block of similarities."""
_CACHE_BYTES = 2 << 20
"""Bytes of vectors that each thread of a CPU takes through all rounds at a time, whole pictures; other devices take all
at once."""


# Where a picture starts: grid and location.


def grid_count(size: tuple[int, int], cells: tuple[int, int], rule: str = "linspace") -> int:
    """How many cells of a grid (rows, columns) a map of `size` really has: small maps have fewer than asked for."""
    one_of("kmeans.grid", rule, GRIDS)
    if rule == "linspace":
        counts = [min(n, side) for side, n in zip(size, cells, strict=True)]
    else:
        counts = [-(-side // -(-side // n)) for side, n in zip(size, cells, strict=True)]
    return counts[0] * counts[1]


def grid_labels(
    size: tuple[int, int],
    cells: tuple[int, int],
    rule: str = "linspace",
    device: torch.device | str | None = None,
    dense: bool = True,
) -> Tensor:
    """Labels of a grid of cells, int64 [H,W]: y + rows * x, rows being the largest y and one.

    `dense`: cells that a small map leaves out are not counted, labels are 0..grid_count-1; False: as released.

    Raises:
        ConfigError: another rule than those of GRIDS.
    """
    one_of("kmeans.grid", rule, GRIDS)
    axes = []
    for side, n in zip(size, cells, strict=True):
        if rule == "ceil":
            axis = torch.arange(side, device=device) // -(-side // n)
        else:
            axis = torch.linspace(0, n - 1, side, device=device).round().long()
            if dense:
                axis = F.pad((axis[1:] != axis[:-1]).long(), (1, 0)).cumsum(0)
        axes.append(axis)
    y, x = axes
    return y[:, None] + (y[-1] + 1) * x[None, :]


def coordinates(size: tuple[int, int], device: torch.device | str | None = None) -> Tensor:
    """(row, column) of every place, int64 [H,W,2]."""
    axes = [torch.arange(side, device=device) for side in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def locations(size: tuple[int, int], rule: str = "centred", device: torch.device | str | None = None) -> Tensor:
    """(y, x) of every place as features, float32 [H,W,2].

    Raises:
        ConfigError: another rule than those of LOCATIONS.
    """
    one_of("kmeans.location", rule, LOCATIONS)
    if rule == "relative":
        axes = [torch.arange(side, device=device) / side for side in size]
    else:
        axes = [torch.linspace(0, 1, side, device=device) for side in size]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return places - 0.5 if rule == "centred" else places


def at_cells(maps: Tensor, size: tuple[int, int], pixel: str = "centre") -> Tensor:
    """Maps of ids or flags [B,H,W] at h x w cells (`size`): [B,h,w].

    pixel: `centre`, the pixel in the middle of a cell; or `corner`, its top left one, which torch's `nearest` takes,
    and so the releases of SegSort and HSG. A convolution of stride 2 with padding on both sides has its outputs at
    pixels 0, 2, 4, …: at a stride of 16 cell 7 of such a network looks at the surroundings of pixel 112, its corner. A
    patch of a transformer looks at pixels 112 to 127, around its centre.

    Raises:
        ConfigError: another pixel than those of CELL_PIXELS.
    """
    one_of("cell_pixel", pixel, CELL_PIXELS)
    axes = []
    for cells, side in zip(size, maps.shape[-2:], strict=True):
        if pixel == "corner":
            places = torch.arange(side, dtype=torch.float32)[None, None]
            axis = F.interpolate(places, size=cells, mode="nearest")[0, 0].long()  # torch's own rounding
        else:
            axis = ((2 * torch.arange(cells) + 1) * side).div(2 * cells, rounding_mode="floor")
        axes.append(axis.to(maps.device))
    return maps[:, axes[0][:, None], axes[1][None, :]]


def located(vectors: Tensor, places: Tensor) -> Tensor:
    """Unit vectors [B,N,D] with their places [N,2] or [B,N,2] appended, unit length again: [B,N,D+2]."""
    places = places.to(vectors.dtype).expand(*vectors.shape[:-1], 2)
    return F.normalize(torch.cat([vectors, places], dim=-1), dim=-1)


# Spherical k-means.


@torch.no_grad()
def spherical_kmeans(
    vectors: Tensor,
    labels: Tensor,
    count: int,
    iterations: int,
    *,
    places: Tensor | None = None,
    valid: Tensor | None = None,
    empty: str = "skip",
    block_bytes: int | None = None,
) -> Tensor:
    """Labels after `iterations` rounds of spherical k-means inside every picture; int64 [B,N], no gradient.

    A round: centres are normalised sums by label, labels the centre of the largest dot product (the first of equals).
    No test of convergence. Computed in float32 without shortcuts (float64 for float64 vectors), also inside autocast.

    Args:
        vectors: [B,N,D] unit rows.
        labels: int64 [B,N] initial labels in 0..count-1; entries that are not valid are not read.
        count: K, clusters of each picture.
        iterations: rounds; 0 gives the initial labels.
        places: [N,2], appended to the vectors as `located` does. None: the vectors as they are.
        valid: bool [B,N]; other pixels take no part and have label -1. None: all are valid.
        empty: `skip` or `zero`, see EMPTY.
        block_bytes: size of the block of similarities. Changes no label.

    Raises:
        ConfigError: another word for `empty`.
    """
    one_of("kmeans.empty", empty, EMPTY)
    vectors = real(vectors.detach())
    skip = empty == "skip"
    work = partial(_rounds, count=count, iterations=iterations, places=places, skip=skip, block_bytes=block_bytes)
    if vectors.device.type != "cpu":
        return work(vectors, labels, valid)
    height = max(1, _CACHE_BYTES // max(1, vectors[:1].nbytes)) * torch.get_num_threads()
    valids = [None] * len(labels) if valid is None else valid.split(height)
    parts = zip(vectors.split(height), labels.split(height), valids, strict=False)
    return torch.cat([work(*part) for part in parts])


def _rounds(
    vectors: Tensor,
    labels: Tensor,
    valid: Tensor | None,
    count: int,
    iterations: int,
    places: Tensor | None,
    skip: bool,
    block_bytes: int | None,
) -> Tensor:
    """`spherical_kmeans` of some pictures, all at once."""
    vectors = vectors.contiguous() if places is None else located(vectors, places)
    pictures, _, dim = vectors.shape
    rows = vectors.reshape(-1, dim)
    first = torch.arange(pictures, device=vectors.device)[:, None] * (count + 1)
    labels = labels if valid is None else labels.where(valid, count)  # the last row of a picture takes the others
    width = max(1, (block_bytes or _BLOCK_BYTES) // max(1, pictures * count * vectors.element_size()))
    with exact(vectors.device):
        for _ in range(iterations):
            table = vectors.new_zeros(pictures * (count + 1), dim)
            table.index_add_(0, (labels + first).view(-1), rows)
            centres = F.normalize(table.view(pictures, count + 1, dim)[:, :count], dim=-1)
            # Clusters before pixels: `max` over the rows of a matrix is faster than `argmax` inside them.
            scores = (torch.bmm(centres, part.mT) for part in vectors.split(width, dim=1))
            if skip:
                filled = vectors.new_zeros(pictures, count + 1).scatter_(1, labels, 1.0)[:, :count, None]
                bias = filled.log()  # 0 where a cluster has pixels, else minus infinity
                scores = (part.add_(bias) for part in scores)
            labels = torch.cat([part.max(1).indices for part in scores], dim=1)
            labels = labels if valid is None else labels.where(valid, count)
    return labels if valid is None else labels.where(valid, -1)


@dataclass(frozen=True)
class Segments:
    """The segments of B pictures of N pixels."""

    unit: Tensor
    """Unit embeddings [B,N,D], with gradient."""
    places: Tensor | None
    """Location of each pixel times its scale [N,2]; None without location."""
    clusters: Tensor
    """int64 [B,N], k-means label of each pixel; -1 where it is not valid."""
    ids: Tensor
    """int64 [B,N], segment of each pixel, dense over the batch, in the order of (picture, cluster, region); or -1."""
    counts: Tensor
    """int64 [B], segments of each picture."""

    @property
    def located(self) -> Tensor:
        """`unit` with location, unit length [B,N,D+2], with gradient; without location `unit` itself."""
        return self.unit if self.places is None else located(self.unit, self.places)


def sort_pixels(
    embeddings: Tensor,
    cells: tuple[int, int],
    iterations: int,
    *,
    regions: Tensor | None = None,
    valid: Tensor | None = None,
    grid: str = "linspace",
    location: str | None = "centred",
    location_scale: float = 1.0,
    empty: str = "skip",
) -> Segments:
    """Segments of pictures by their embeddings: k-means from a grid of cells, cut by regions.

    Args:
        embeddings: [B,D,h,w], not normalised. Gradient reaches `unit` and `located`, never labels.
        cells: rows and columns of the initial grid; 1 x 1 leaves the regions as they are.
        iterations: rounds of k-means.
        regions: int64 [B,h,w], any values; None: no cut.
        valid: bool [B,h,w]; other pixels belong to no segment. None: all are valid.
        grid, location, empty: rules by name, see GRIDS, LOCATIONS, EMPTY; location None: embeddings alone.
        location_scale: weight of the location beside a unit embedding.
    """
    size = tuple(embeddings.shape[-2:])
    rows = embeddings.flatten(2).mT
    unit = F.normalize(real(rows), dim=2)
    places = None
    if location is not None:
        places = locations(size, location, unit.device).flatten(0, 1) * location_scale
    start = grid_labels(size, cells, grid, unit.device).flatten().expand(len(unit), -1)
    inside = None if valid is None else valid.flatten(1)
    count = grid_count(size, cells, grid)
    clusters = spherical_kmeans(unit, start, count, iterations, places=places, valid=inside, empty=empty)
    ids, counts = segment_ids(clusters, None if regions is None else regions.flatten(1))
    return Segments(unit, places, clusters, chained(ids, counts), counts)


def sorting(settings: Any, key: str) -> dict[str, Any]:
    """Arguments of `sort_pixels` from keys `cells`, `iterations`, `grid`, `location` (or none), `location_scale` and
    `empty` that stand under `key`. Raises ConfigError for words and cells that cannot be."""
    for name, known in (("grid", GRIDS), ("location", (*LOCATIONS, "none")), ("empty", EMPTY)):
        one_of(f"{key}.{name}", settings[name], known)
    if len(settings.cells) != 2 or min(settings.cells) < 1:
        raise ConfigError(f"{key}.cells={list(settings.cells)}: expected rows and columns, such as [5,5]")
    return {
        "cells": tuple(settings.cells),
        "iterations": settings.iterations,
        "grid": settings.grid,
        "location": None if settings.location == "none" else settings.location,
        "location_scale": settings.location_scale,
        "empty": settings.empty,
    }


# Ids of segments.


@torch.no_grad()
def relabel(keys: Tensor, valid: Tensor | None = None, order: str = "key") -> tuple[Tensor, Tensor]:
    """Dense ids of the distinct keys in each row: ids int64 [B,N], -1 where not valid, and how many there are, [B].

    keys: int64 [B,N], any values. `order`: ids follow the sorted keys, or their first appearance in the row.

    Raises:
        ConfigError: another order.
    """
    one_of("order", order, ORDERS)
    count = keys.shape[1]
    valid = torch.ones_like(keys, dtype=torch.bool) if valid is None else valid
    keys = keys.where(valid, torch.iinfo(torch.int64).max)
    ordered, places = keys.sort(dim=1, stable=True)
    ranks = F.pad((ordered[:, 1:] != ordered[:, :-1]).long(), (1, 0)).cumsum(1)
    ids = torch.empty_like(keys).scatter_(1, places, ranks)
    number = (ids.where(valid, -1)).amax(1) + 1
    if order == "appearance":
        position = torch.arange(count, device=keys.device).expand_as(ids).where(valid, count)
        first = torch.full_like(ids, count).scatter_reduce_(1, ids, position, "amin")
        sequence = torch.arange(count, device=keys.device).expand_as(ids)
        place = torch.empty_like(ids).scatter_(1, first.argsort(dim=1, stable=True), sequence)
        ids = place.gather(1, ids)
    return ids.where(valid, -1), number


def segment_ids(clusters: Tensor, regions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Segments of every picture: ids [B,N] in the order of (cluster, region), and how many, [B].

    clusters: int64 [B,N], -1 where a pixel does not count. regions: int64 [B,N]; None: clusters alone. The range of the
    regions times the number of clusters must stay below 2^63.
    Ids start at 0 in every picture; `chained` makes them distinct over a batch.
    """
    valid = clusters >= 0
    if regions is None:
        return relabel(clusters, valid)
    lowest = regions.min()
    return relabel(clusters * (regions.max() - lowest + 1) + (regions - lowest), valid)


def chained(ids: Tensor, counts: Tensor) -> Tensor:
    """Ids [B,N] that are distinct over the batch, in the order of pictures; -1 stays."""
    return ids.where(ids < 0, ids + (counts.cumsum(0) - counts)[:, None])


# Sums over segments. A table has `count` rows; id -1 belongs to none.


def segment_sums(vectors: Tensor, ids: Tensor, count: int) -> Tensor:
    """Sum of the vectors [n,D] of each segment, [count,D], float32 or float64. Gradient reaches the vectors."""
    vectors = real(vectors)
    rows = ids.where(ids >= 0, count)
    return vectors.new_zeros(count + 1, vectors.shape[1]).index_add(0, rows, vectors)[:count]


def segment_sizes(ids: Tensor, count: int) -> Tensor:
    """Pixels of each segment, int64 [count]."""
    rows = ids.where(ids >= 0, count)
    return torch.zeros(count + 1, dtype=torch.int64, device=ids.device).scatter_add_(0, rows, torch.ones_like(rows))[
        :count
    ]


def segment_means(vectors: Tensor, ids: Tensor, count: int) -> Tensor:
    """Plain mean of the vectors [n,D] of each segment, [count,D]; zero where a segment has none."""
    return segment_sums(vectors, ids, count) / segment_sizes(ids, count).clamp(min=1)[:, None]


def prototypes(vectors: Tensor, ids: Tensor, count: int) -> Tensor:
    """Unit-length sum of the vectors [n,D] of each segment, [count,D]; zero where a segment has none.

    Not detached: gradients reach pixels through their prototype.
    """
    return F.normalize(segment_sums(vectors, ids, count), dim=1)


def segment_values(values: Tensor, ids: Tensor, count: int) -> Tensor:
    """What all pixels of a segment have in common (picture, region, group): int64 [n] -> [count], -1 without pixels.

    values are not negative. Where pixels differ the largest counts.
    """
    rows = ids.where(ids >= 0, count)
    return values.new_full((count + 1,), -1).scatter_reduce_(0, rows, values, "amax")[:count]


def majority_labels(labels: Tensor, ids: Tensor, count: int, classes: int) -> Tensor:
    """The most frequent label of each segment, int64 [count]; of equals the smallest; -1 without labelled pixels.

    labels: int64 [n]; those outside 0..classes-1 are not counted.
    """
    counted = (ids >= 0) & (labels >= 0) & (labels < classes)
    cells = (ids * classes + labels).where(counted, count * classes)
    votes = torch.zeros(count * classes + 1, dtype=torch.int64, device=ids.device)
    votes = votes.scatter_add_(0, cells, torch.ones_like(cells))[:-1].view(count, classes)
    return votes.argmax(1).where(votes.any(1), -1)


# Segments as nodes of their owner (a picture, all views together).


def slot_table(owners: Tensor, groups: int, slots: int, sizes: Tensor | None = None) -> Tensor:
    """Which segment stands in each slot of each owner: int64 [G,slots], -1 on padding.

    Args:
        owners: int64 [S], owner 0..G-1 of each segment; -1 where the row of the table is no segment.
        groups: G.
        slots: places of each owner. The release fails where an owner has more segments.
        sizes: [S]; of an owner with more segments than slots the largest stay. None: the first stay.

    Segments keep their order.
    """
    mine = owners[:, None] == torch.arange(groups, device=owners.device)

    def ranks(members: Tensor) -> Tensor:
        return ((members.cumsum(0) - 1) * members).sum(1)

    kept = owners >= 0
    if sizes is not None:
        order = sizes.argsort(descending=True, stable=True)
        kept = kept & (torch.empty_like(owners).scatter_(0, order, ranks(mine[order])) < slots)
    place = ranks(mine & kept[:, None])
    kept = kept & (place < slots)
    table = owners.new_full((groups * slots + 1,), -1)
    cells = (owners * slots + place).where(kept, groups * slots)
    table.scatter_(0, cells, torch.arange(len(owners), device=owners.device))
    return table[:-1].view(groups, slots)


def take(values: Tensor, table: Tensor, fill: float = 0) -> Tensor:
    """Rows of `values` [S,...] at a table of ids [...], and `fill` where the id is -1. Gradient reaches the values."""
    found = values[table.clamp(min=0)]
    absent = (table < 0).view(*table.shape, *[1] * (values.dim() - 1))
    return found.masked_fill(absent, fill)
