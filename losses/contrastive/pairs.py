"""Positives of patches as a list of pairs: found in blocks of similarities, never more than one block in memory.

A similarity belongs to both of its patches. So between anchors only the columns behind an anchor are computed, and a
pair is kept once with what it is for either end; all other columns are computed in full.

Products are bfloat16 where a machine has them, as a sieve: what may be a positive is computed anew in float32, and that
decides. How far the sieve may be off is bounded. Let e_i = f_i - g_i be what rounding a row to bfloat16 takes away (a
part of at most 2^-8 of every number; its norms are measured). Then

    |<f_i,f_j> - <g_i,g_j>| = |<e_i,f_j> + <g_i,e_j>| <= max|e| (max|f| + max|g|)

by Cauchy and Schwarz. Products of two bfloat16 numbers are exact in float32. Summing C of them there, in any order and
with truncation instead of rounding, is off by at most C 2^-22 max|g|^2 to first order (twice over), and the float32
product that decides by less, C 2^-22 max|f|^2. The sum E of these three bounds what separates a pair's sieved value
before its last rounding from its float32 value. A threshold is lowered by E and then to a bfloat16 number t. Rounding
the value to bfloat16 is monotone and leaves t where it is: whatever lies above a threshold in float32 is at least t in
the sieve. So no positive is missed; "float32" means the same formula in another order of summation, as between blocks
of different heights.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from losses.contrastive.positives import row_blocks

_SHAPES = {"cpu": (256, 2048)}
"""Anchors and columns of a block: on a CPU it stays in a core's cache between its product and its comparisons."""
_SHAPE = 1024, 1 << 16
"""Elsewhere, where few large steps are better than many small ones."""
_SUM = 2.0**-22

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Whole numbers of so many bytes."""

TO_SECOND, TO_FIRST = 1, 2
"""Bits of a pair for the first kind of positives: its second patch is one of its first, and the other way round; the
next kind has the next two bits."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of patches of which one at least is an anchor that has the other among its positives, sorted by `first`.

    first is an anchor, second any other patch; a pair of two anchors is there once, with first < second. int64 [n].
    """

    first: Tensor
    second: Tensor
    bits: Tensor
    """[n] uint8."""


@torch.no_grad()
def find_pairs(
    kinds: list[tuple[Tensor, Tensor]],
    anchors: slice,
    symmetric: bool,
    *,
    most: float | None = None,
    half: bool | None = None,
    shape: tuple[int, int] | None = None,
) -> Pairs | None:
    """All positives of the anchors, of every kind; None as soon as more than `most` pairs may be (sieved ones count).

    kinds: unit rows [N,C] and threshold [N] of each kind. half: sieve in bfloat16; None does where it is native.
    shape: anchors and columns of a block; it changes rounding only.
    """
    rows = kinds[0][0]
    if half is None:
        half = native_half(rows.device)
    half = half and rows.dtype == torch.float32
    sieves = [_rounded(*kind) if half else kind for kind in kinds]
    height, width = shape or _SHAPES.get(rows.device.type, _SHAPE)
    found, count = [], 0
    with _float32_sums() if half else nullcontext():
        for block in _blocks(len(rows), anchors, height, width):
            part = _positives(sieves, *block, anchors, symmetric, strict=not half)
            found.append(part)
            count += len(part[0])
            if most is not None and count > most:
                return None
    first, second, bits = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = ordered(second, len(rows))
    order = order[ordered(first[order], len(rows))]
    pairs = Pairs(first[order], second[order], bits[order])
    return _decided(pairs, kinds, anchors, symmetric) if half else pairs


def pair_products(rows: Tensor, first: Tensor, second: Tensor, anchors: slice) -> Tensor:
    """<row_i, row_j> of pairs [n] whose `first` are sorted rows of `anchors`; [n]."""
    crow = run_starts(first - anchors.start, anchors.stop - anchors.start)
    shape = anchors.stop - anchors.start, len(rows)
    zeros = rows.new_zeros(len(first))
    pattern = torch.sparse_csr_tensor(crow, second, zeros, shape, check_invariants=False)
    return torch.sparse.sampled_addmm(pattern, rows[anchors], rows.T, beta=0.0).values()


def places(values: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of the entries of [h,w] that are not 0, row by row. On CPUs numpy passes over runs of zeros some
    three times as fast as torch; -0.0 counts there."""
    if values.device.type != "cpu":
        return values.nonzero(as_tuple=True)
    bits = values.contiguous().view(_WHOLE[values.element_size()]).numpy()
    at = torch.from_numpy(np.flatnonzero(bits != 0))
    row = at // values.shape[1]
    return row, at - row * values.shape[1]


def ordered(index: Tensor, total: int) -> Tensor:
    """The stable order of an index of 0..total-1. On CPUs numpy sorts 16 bits by their digits, some five times as fast
    as torch sorts 64 by comparing."""
    if index.device.type != "cpu" or total > 1 << 16:
        return index.argsort(stable=True)
    return torch.from_numpy(np.argsort(index.numpy().astype(np.uint16), kind="stable"))


def run_starts(index: Tensor, total: int) -> Tensor:
    """Where the run of each of `total` values starts in the sorted index, and its end: [total + 1]."""
    ends = torch.bincount(index, minlength=total).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def native_half(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 ones here: by its instructions, or a GPU's age."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()


def _blocks(total: int, anchors: slice, height: int, width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of blocks: anchors against the anchors from the block's own on, and against all other rows."""
    for rows in row_blocks(anchors, height):
        for columns in (slice(rows.start, anchors.stop), slice(0, anchors.start), slice(anchors.stop, total)):
            yield from ((rows, part) for part in row_blocks(columns, width))


def _positives(
    kinds: list[tuple[Tensor, Tensor]], rows: slice, columns: slice, anchors: slice, symmetric: bool, strict: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of a block: first, second, bits. Comparisons are >, or >= where they only sieve."""
    mutual = anchors.start <= columns.start < anchors.stop
    codes = None
    for number, (features, threshold) in enumerate(kinds):
        scores = torch.mm(features[rows], features[columns].T)
        own, other = threshold[rows, None], threshold[columns]
        # Compared in place, in the type of the products: into booleans it takes torch several times as long.
        above = Tensor.gt_ if strict else Tensor.ge_
        if symmetric:
            marks = above(scores, torch.minimum(own, other))
        else:
            marks = above(scores.clone(), own)
            if mutual:
                marks.add_(above(scores, other), alpha=TO_FIRST)
        codes = marks if codes is None else codes.add_(marks, alpha=4**number)
    if mutual and columns.start < rows.stop:
        codes.triu_(rows.start - columns.start + 1)
    row, column, bits = _nonzero(codes)
    if symmetric and mutual:
        bits *= TO_SECOND + TO_FIRST
    return row + rows.start, column + columns.start, bits


def _nonzero(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and value (uint8) of the entries of [h,w] that are not 0."""
    row, column = places(codes)
    return row, column, codes[row, column].to(torch.uint8)


# ---------------------------------------------------------------- the sieve


def _rounded(features: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in bfloat16, and thresholds that their products reach wherever the float32 ones pass the given ones."""
    rows = features.bfloat16()
    rest = _longest(features - rows)
    whole, kept = _longest(features), _longest(rows.float())
    error = rest * (whole + kept) + features.shape[1] * _SUM * (2 * kept.square() + whole.square())
    lower = threshold - 1.001 * error  # the norms are rounded themselves
    near = torch.where(threshold.isfinite(), lower, threshold).bfloat16()
    below = near.nextafter(torch.full_like(near, -torch.inf))
    return rows, torch.where(near.float() > lower, below, near)


def _longest(rows: Tensor) -> Tensor:
    """Greatest norm of the rows, of those that have one."""
    return rows.norm(dim=1).nan_to_num(0.0, 0.0).amax()


def _decided(pairs: Pairs, kinds: list[tuple[Tensor, Tensor]], anchors: slice, symmetric: bool) -> Pairs:
    """The sieved pairs that are positives by their float32 products."""
    bits = torch.zeros_like(pairs.bits)
    for number, (features, threshold) in enumerate(kinds):
        sieved = (pairs.bits >> (2 * number)) & (TO_SECOND | TO_FIRST)
        at = sieved.nonzero()[:, 0]
        first, second = pairs.first[at], pairs.second[at]
        products = pair_products(features, first, second, anchors)
        ahead, back = products > threshold[first], products > threshold[second]
        if symmetric:
            ahead = back = ahead | back
        kept = (ahead * TO_SECOND + back * TO_FIRST).to(torch.uint8)
        bits[at] |= (kept & sieved[at]) << (2 * number)
    left = bits.nonzero()[:, 0]
    return Pairs(pairs.first[left], pairs.second[left], bits[left])


@contextmanager
def _float32_sums() -> Iterator[None]:
    """Sums of bfloat16 products stay float32 inside, also where a GPU adds parts of them; settings are restored."""
    backend = torch.backends.cuda.matmul
    before = backend.allow_bf16_reduced_precision_reduction
    backend.allow_bf16_reduced_precision_reduction = False
    try:
        yield
    finally:
        backend.allow_bf16_reduced_precision_reduction = before
