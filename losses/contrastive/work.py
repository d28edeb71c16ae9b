"""What the two ways of the contrastive loss cost, in the floating-point operations of a matrix product.

The finding of the positives is left out: either way does it. Constants are rounded from times on one core of a
processor with AVX-512, and they choose a way, nothing else.
"""

from torch import Tensor

from losses.contrastive.pairs import Pairs
from losses.contrastive.plan import Plan

_PASSES = 500
"""Of the dense sweep: what a pair of patches costs beside its three products (reads and writes of float blocks)."""
_GATHERED = 150
"""Of the sparse way: what a number of a gathered candidate costs beside its products: it is read, written and added."""
_PAIRED = 250
"""Of the sparse way: what a number of a pair of positives costs, which is multiplied three times from where it lies."""
_PAIR_BYTES = 128
"""Of a pair and all that is computed of it, about."""
_MEMORY = {"cpu": 256 << 20, "cuda": 4 << 30}


def dense_work(plan: Plan, z: Tensor, sides: int) -> float:
    """The sweep over all pairs of anchors and patches."""
    total, dim = z.shape
    return float(sides * len(plan.pictures) * plan.cells * total * (6 * dim + _PASSES))


def sparse_work(plan: Plan, z: Tensor, sides: int, pairs: int) -> float:
    """Candidates, which all pictures share, and so many pairs of positives."""
    of_candidates = plan.candidate_count * (6 * len(plan.pictures) + _GATHERED)
    return float(sides * z.shape[1] * (of_candidates + pairs * _PAIRED))


def affordable_pairs(plan: Plan, z: Tensor, sides: int) -> float:
    """How many pairs of positives the sparse way takes for less work than the dense sweep, and in bounded memory."""
    left = dense_work(plan, z, sides) - sparse_work(plan, z, sides, 0)
    room = _MEMORY.get(z.device.type, 0) / _PAIR_BYTES  # no sparse products on other devices
    return min(left / (sides * z.shape[1] * _PAIRED), room)


def told(plan: Plan, z: Tensor, sides: int, pairs: Pairs | None) -> str:
    """The way that is taken and its counted work beside the other's, in a line."""
    every = dense_work(plan, z, sides) / 1e9
    if pairs is None:
        return f"dense: all pairs of patches, {every:.3g} GFLOP"
    count = len(pairs.first)
    few = sparse_work(plan, z, sides, count) / 1e9
    return f"sparse: candidates and {count} pairs of positives, as {few:.3g} GFLOP; all pairs are {every:.3g}"
