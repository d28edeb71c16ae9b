"""Positives of patches as masks: thresholds of a pool, who is above them, and what the denominators hold."""

from collections.abc import Iterator

import torch
from torch import Tensor

from common.errors import ConfigError
from common.precision import real

BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
BLOCKS = 3
"""Float blocks [anchors,N] that live at a time in the dense sweep: weights, denominators, scores."""
MIN_ANCHORS = 128
"""Anchors of a block at least: below it the products turn into memory traffic."""


@torch.no_grad()
def thresholds(features: Tensor, pool: Tensor) -> Tensor:
    """c_i = max_m <f_i, q_m> for unit rows features [N,C] and pool [M,C]; [N] float32, no gradient.

    Raises:
        ConfigError: the pool is empty.
    """
    if not len(pool):
        raise ConfigError("the reference pool is empty: fill it before the first training step")
    with torch.autocast(features.device.type, enabled=False):
        features = full(features)
        pool = pool.to(features.dtype)
        height = block_height(len(features), len(pool), features)
        scores = features.new_empty(height, len(pool))
        best = [torch.mm(part, pool.T, out=scores[: len(part)]).amax(1) for part in features.split(height)]
        return torch.cat(best)


@torch.no_grad()
def positive_mask(features: Tensor, threshold: Tensor, rows: slice, *, symmetric: bool = True) -> Tensor:
    """A_ij of the anchors i in `rows` against all N, [rows,N] bool: <f_i,f_j> > c_i, or > c_j where `symmetric`.

    features [N,C] unit rows, threshold [N]. The comparison is strict, and a patch is no positive of itself.
    """
    count = rows.stop - rows.start
    mask = torch.empty(count, len(features), dtype=torch.bool, device=features.device)
    shape = block_height(count, len(features), features), len(features)
    fill_positives(mask, features, threshold, rows, symmetric, features.new_empty(shape), features.new_empty(shape))
    return mask


def fill_positives(
    mask: Tensor, features: Tensor, threshold: Tensor, rows: slice, symmetric: bool, scores: Tensor, limits: Tensor
) -> Tensor:
    """Write `positive_mask` into `mask` [rows,N] in blocks of the height of `scores` and `limits`; positives [rows]."""
    counts = []
    for part in row_blocks(rows, len(scores)):
        own, anchors = threshold[part, None], features[part]
        block = torch.mm(anchors, features.T, out=scores[: len(anchors)])
        # Compared and counted as floats, which torch does several times faster than into booleans.
        block.gt_(torch.minimum(own, threshold, out=limits[: len(anchors)]) if symmetric else own)
        block.diagonal(part.start).fill_(0.0)
        counts.append(block.sum(1))
        mask[part.start - rows.start : part.stop - rows.start] = block
    return torch.cat(counts)


@torch.no_grad()
def denominator_mask(positives: Tensor, candidates: Tensor | None, start: int, out: Tensor | None = None) -> Tensor:
    """D_ij = (positive or random candidate) and j != i for one picture's anchors, whose first patch is row `start`.

    positives [N_p,N] bool; candidates [N_p,N] bool, None for all. [N_p,N] bool.
    """
    out = torch.empty_like(positives) if out is None else out
    if candidates is None:
        out.fill_(True)
    else:
        torch.logical_or(positives, candidates, out=out)
    out.diagonal(start).fill_(False)
    return out


def full(rows: Tensor) -> Tensor:
    """The rows in float32 (float64 as they are), contiguous."""
    return real(rows).contiguous()


def block_height(count: int, width: int, like: Tensor, block_bytes: int | None = None) -> int:
    """How many of `count` rows of `width` floats are worked on at a time; even parts of about the size asked for."""
    wanted = block_bytes or BLOCK_BYTES.get(like.device.type, 1 << 30)
    fitting = wanted // (BLOCKS * like.element_size() * width)
    height = max(1, fitting if block_bytes else max(fitting, MIN_ANCHORS))
    return -(-count // -(-count // height))


def row_blocks(rows: slice, height: int) -> Iterator[slice]:
    """Slices of at most `height` rows."""
    return (slice(first, min(first + height, rows.stop)) for first in range(rows.start, rows.stop, height))
