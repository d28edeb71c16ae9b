"""The first eigenvectors of graph Laplacians: normalised and plain cuts of a batch of graphs of one size.

The problem is (D - W) y = l D y (`normalized`) or (D - W) y = l y, W symmetric, D its row sums. The small l are the
large eigenvalues of A = D^-1/2 W D^-1/2 (or of (W - D) / max d), so no factorisation of a singular matrix is needed and
products with W do: a block Krylov method, in which blocks of rows are multiplied by W, made orthogonal to all earlier
ones, and the problem is solved inside their span (Rayleigh-Ritz); a span that has grown too wide starts anew from its
best vectors. The vector of l = 0 of a graph without negative weights is known (constant y) and is kept out, so a graph
that nearly falls apart costs no accuracy there. Every vector's residual is checked against the graph itself; a graph
that misses the bound is solved densely in float64.

Glossary: B graphs, N nodes, k vectors, d degrees (row sums), mu = eigenvalues of A, b rows of a block.
Sources: Shi and Malik, Normalized Cuts (PAMI 2000); Golub and Underwood, The block Lanczos method (1977); Stathopoulos
and Wu, orthogonalisation by the Gram matrix (SISC 2002).
"""

import logging
import math
from dataclasses import dataclass

import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from common import chance
from common.errors import ConfigError, LabelfreeError, one_of
from common.precision import exact, real

log = logging.getLogger(__name__)

NEAREST = ("smallest", "modulus")
"""Which eigenvalues: the smallest, or those of smallest magnitude, as shift-invert around zero finds them (released).
They differ only where weights are negative."""
SOLVERS = ("auto", "dense")
"""`auto`: block Krylov, dense where that is faster or needed; `dense`: float64 `eigh` of the whole matrix."""
SIGNS = ("minority", "peak")
"""Sign of a vector. Both first make the entry of largest magnitude (the first of equals) positive. `minority` then
negates a vector of which more than half the entries, but not all, are positive: the foreground is the smaller part."""

_DENSE_NODES = 192
"""Up to so many nodes the dense solver is faster."""
_SPARE = 5
"""Rows of a block beyond the wanted ones, at least: they speed up the last vectors."""
_ROWS = 4
"""A block has a multiple of so many rows: products with fewer are as slow on a CPU."""
_BLOCKS = 12
"""Blocks of a span before it starts anew."""
_AHEAD = 4
"""Blocks at most between two looks at the residuals; how many follows from how fast they fall."""
_ROUNDS = 6
"""Spans before a graph is given to the dense solver."""
_EMPTY = 1e-12
"""Row sums below it count as 1, as released."""
_CACHE_BYTES = 4 << 20
"""Bytes of graphs that a CPU takes through all products at a time, whole graphs; other devices take all at once."""


@dataclass(frozen=True)
class Spectrum:
    """The first k eigenpairs of B graphs. No gradient."""

    values: Tensor
    """[B,k], ascending."""
    vectors: Tensor
    """[B,k,N], as rows. y^T D y = 1, with `normalized=False` y^T y = 1."""
    residuals: Tensor
    """[B,k]: |A z - mu z| of the unit vector z = D^1/2 y (or y); see the module for A, whose largest mu is about 1.
    0 for the constant vector."""
    dense: Tensor
    """bool [B]: solved by the dense solver."""


@torch.no_grad()
def smallest(
    affinity: Tensor,
    k: int,
    *,
    normalized: bool = True,
    nearest: str = "smallest",
    sign: str = "minority",
    solver: str = "auto",
    tolerance: float = 1e-5,
    seed: int = 0,
) -> Spectrum:
    """The k eigenpairs of smallest eigenvalue of each graph's Laplacian, detached.

    The first vector of a graph without negative weights is the constant one (exactly so), value 0. A vector is as sure
    as its residual divided by the distance of its value to the next: within a cluster of values only the span is.
    Computed in float32 without shortcuts, also inside autocast; float64 for a float64 affinity.

    Args:
        affinity: [B,N,N] symmetric (not checked). A row sum below 1e-12 counts as 1 in D.
        k: vectors, the constant one included.
        nearest, sign, solver: see NEAREST, SIGNS and SOLVERS.
        tolerance: bound of the residuals. A float32 graph reaches about 1e-6.
        seed: of the first block. Changes results within the tolerance only.

    Raises:
        ConfigError: more vectors than nodes, or an unknown word.
        LabelfreeError: weights that are not finite.
    """
    for key, word, known in (("nearest", nearest, NEAREST), ("sign", sign, SIGNS), ("solver", solver, SOLVERS)):
        one_of(f"spectral.{key}", word, known)
    nodes = affinity.shape[-1]
    if not 1 <= k <= nodes:
        raise ConfigError(f"spectral.k={k}: a graph of {nodes} nodes has 1 to {nodes} eigenvectors; lower k")
    weights = real(affinity.detach())
    if weights.device.type != "cpu" or not len(weights):
        height = max(1, len(weights))
    else:
        height = max(1, _CACHE_BYTES // weights[0].nbytes)
    parts = []
    with exact(weights.device):
        for first in range(0, max(1, len(weights)), height):
            part = weights[first : first + height]
            parts.append(_solve(part, k, normalized, nearest, solver, tolerance, seed, first))
    values, vectors, residuals, dense = (torch.cat(rows) for rows in zip(*parts, strict=True))
    if solver == "auto" and nodes > _DENSE_NODES and bool(dense.any()):
        log.info("eigenvectors: %d of %d graphs of %d nodes were solved densely", int(dense.sum()), len(dense), nodes)
    return Spectrum(values, oriented(vectors, sign), residuals, dense)


def degrees(affinity: Tensor) -> Tensor:
    """D of graphs [B,N,N]: row sums [B,N], 1 where they are below 1e-12."""
    return _floored(real(affinity).sum(2))


def _floored(degree: Tensor) -> Tensor:
    return torch.where(degree < _EMPTY, 1.0, degree)


def oriented(vectors: Tensor, rule: str = "minority") -> Tensor:
    """Vectors [...,N] with the sign that the rule gives each of them, see SIGNS."""
    one_of("spectral.sign", rule, SIGNS)
    peak = vectors.gather(-1, vectors.abs().argmax(-1, keepdim=True))
    vectors = torch.where(peak < 0, -vectors, vectors)
    if rule == "minority":
        share = (vectors > 0).to(vectors.dtype).mean(-1, keepdim=True)
        vectors = torch.where((share > 0.5) & (share < 1), -vectors, vectors)
    return vectors


def _solve(
    weights: Tensor, k: int, normalized: bool, nearest: str, solver: str, tolerance: float, seed: int, first: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(values, vectors, residuals, dense) of some graphs; `first` is the number of the first of them, for errors."""
    degree = weights.sum(2)
    broken = (~torch.isfinite(degree)).sum(1)
    if bool(broken.any()):
        at = int(broken.argmax())
        raise LabelfreeError(
            f"graph {first + at}: {int(broken[at])} of {degree.shape[1]} nodes have weights that are not finite; "
            "look for a picture or a precision that gives features that are not finite"
        )
    graph = _Graph(weights, degree, normalized)
    signed = bool(weights.amin() < 0)
    whole = not signed and bool((degree > _EMPTY).any(1).all())
    many = k - int(whole) > degree.shape[1] // 4  # more than a block may have
    if solver == "dense" or degree.shape[1] <= _DENSE_NODES or many or (signed and nearest == "modulus"):
        tops, rows = graph.dense(k, nearest)
        residuals, dense = graph.residuals(tops, rows), torch.ones_like(broken, dtype=torch.bool)
    else:
        tops, rows, residuals = _krylov(graph, k, whole, tolerance, seed)
        dense = ~(residuals <= tolerance).all(1)
        if bool(dense.any()):
            tops[dense], rows[dense] = _Graph(weights[dense], degree[dense], normalized).dense(k, "smallest")
            residuals = graph.residuals(tops, rows)
    if not signed:  # the constant vector is known: what a product shows here are sums of positive float32 numbers
        residuals[:, 0] = 0
    return graph.values(tops), graph.vectors(rows), residuals, dense


class _Graph:
    """A of the module's text as an operator on rows [B,b,N], and the way back from its eigenvectors to those of L."""

    def __init__(self, weights: Tensor, degree: Tensor, normalized: bool):
        self.weights, self.normalized = weights, normalized
        self.degree = _floored(degree)[:, None]
        self.half = self.degree.rsqrt()
        self.scale = self.degree.amax(2, keepdim=True)
        constant = degree.clamp(min=0).sqrt() if normalized else torch.ones_like(degree)
        self.constant = (constant / torch.linalg.vector_norm(constant, dim=1, keepdim=True).clamp(min=_EMPTY))[:, None]
        """[B,1,N]: the unit vector of l = 0; it is zero on nodes without a weight."""

    def apply(self, rows: Tensor) -> Tensor:
        # Rows times W: several times faster on a CPU than W times columns.
        if self.normalized:
            return torch.bmm(rows * self.half, self.weights).mul_(self.half)
        return torch.bmm(rows, self.weights).sub_(rows * self.degree).div_(self.scale)

    def residuals(self, tops: Tensor, rows: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.apply(rows) - tops[:, :, None] * rows, dim=2)

    def values(self, tops: Tensor) -> Tensor:
        return 1 - tops if self.normalized else -tops * self.scale[:, :, 0]

    def vectors(self, rows: Tensor) -> Tensor:
        return rows * self.half if self.normalized else rows

    def dense(self, k: int, nearest: str) -> tuple[Tensor, Tensor]:
        """(mu [B,k], unit rows [B,k,N]) from float64 `eigh`, one graph at a time: a large matrix fits once."""
        found = [self._dense(*parts, k, nearest) for parts in zip(self.weights, self.scale, strict=True)]
        tops, rows = (torch.stack(parts).to(self.weights.dtype) for parts in zip(*found, strict=True))
        return tops, rows

    def _dense(self, weights: Tensor, scale: Tensor, k: int, nearest: str) -> tuple[Tensor, Tensor]:
        matrix = weights.double()
        degree = _floored(matrix.sum(1))
        if self.normalized:
            half = degree.rsqrt()
            matrix = matrix * half[:, None] * half
            matrix = torch.diagonal_scatter(-matrix, 1 - matrix.diagonal())
        else:
            matrix = torch.diagonal_scatter(-matrix, degree - matrix.diagonal())
        if nearest == "smallest" and matrix.device.type == "cpu" and len(matrix) > _DENSE_NODES:  # only those asked for
            found = scipy.linalg.eigh(matrix.numpy(), subset_by_index=[0, k - 1], overwrite_a=True, check_finite=False)
            values, columns = (torch.from_numpy(part) for part in found)
        else:
            values, columns = torch.linalg.eigh(matrix)
        if nearest == "modulus":
            chosen = values.abs().argsort(stable=True)[:k].sort().values
        else:
            chosen = torch.arange(k, device=values.device)
        values = values[chosen]
        return 1 - values if self.normalized else -values / scale[0].double(), columns[:, chosen].T


def _krylov(graph: _Graph, k: int, deflate: bool, tolerance: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(mu [B,k] descending, unit rows [B,k,N], residuals [B,k]), whether the bound is met or not.

    `deflate`: the constant vector is the first one, with residual 0, and all others are kept orthogonal to it.
    """
    constant = graph.constant
    count, nodes = constant.shape[0], constant.shape[2]
    known = 1 if deflate else 0
    wanted = k - known
    top = constant.new_full((count, 1), 1.0 if graph.normalized else 0.0)
    if not wanted:
        return top, constant.clone(), torch.zeros_like(top)
    width = min(math.ceil((wanted + _SPARE) / _ROWS) * _ROWS, nodes // 4)
    limit = min(_BLOCKS * width, nodes // 2)
    basis = constant.new_empty(count, known + limit, nodes)
    basis[:, :known] = constant[:, :known]
    random = chance.generator(seed, "eigenvectors")
    noise = F.normalize(torch.randn(width, nodes, generator=random), dim=1).to(constant).expand(count, -1, -1)
    start = noise
    for _ in range(_ROUNDS):
        tops, start = _span(graph, basis, known, start, noise, wanted, tolerance)
        tops, rows = tops[:, :wanted], start[:, :wanted]
        residuals = graph.residuals(tops, rows)
        if bool((residuals <= tolerance).all()):
            break
    if not known:
        return tops, rows, residuals
    parts = ((top, tops), (constant, rows), (torch.zeros_like(top), residuals))
    return tuple(torch.cat(pair, 1) for pair in parts)


def _span(
    graph: _Graph, basis: Tensor, known: int, start: Tensor, noise: Tensor, wanted: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """One span from a block of rows: its best values and rows, as many as the block has.

    basis [B,known+limit,N] holds the known rows and takes the span. Ends where the estimated residuals of the wanted
    rows fall below the tolerance, or at the limit. The problem inside the span is solved only where they may have.
    """
    width, limit = start.shape[1], basis.shape[1] - known
    limit -= limit % width
    table = basis.new_zeros(len(basis), limit, limit)
    filled, block = 0, _orthonormal(start, basis[:, :known], noise)
    goal, before, steps, due = 0.7 * tolerance, 0.0, 1, min(2 * width, limit)
    while True:
        new = slice(filled, filled + width)
        basis[:, known + new.start : known + new.stop] = block
        filled += width
        spanned = basis[:, : known + filled]
        block = graph.apply(block)
        inner = torch.bmm(block, spanned.mT)
        block = torch.baddbmm(block, inner, spanned, alpha=-1)  # what leads out of the span
        table[:, new, :filled] = inner[:, :, known:]
        table[:, :filled, new] = inner[:, :, known:].mT
        if filled in (due, limit):
            values, turns = torch.linalg.eigh(table[:, :filled, :filled])
            turns = turns[:, :, -width:].flip(2)
            # |A z - mu z| of a Ritz row is the length of its share of the block that leads out.
            outside = torch.bmm(turns[:, new].mT.to(block.dtype), block)
            worst = float(torch.linalg.vector_norm(outside[:, :wanted], dim=2).amax())
            if filled == limit or worst <= goal:
                rows = torch.bmm(turns.mT.to(basis.dtype), basis[:, known : known + filled])
                return values[:, -width:].flip(1).to(basis.dtype), rows
            falls = math.log(before / worst) / steps if before > worst else 0.0
            steps = int(min(max(math.log(worst / goal) / falls, 1), _AHEAD)) if falls else 1
            before, due = worst, min(filled + steps * width, limit)
        block = _orthonormal(block, spanned, noise)


def _orthonormal(block: Tensor, spanned: Tensor, noise: Tensor) -> Tensor:
    """Rows [B,b,N] as orthonormal ones that are orthogonal to `spanned` [B,m,N]; directions that vanish become noise.

    By the eigenvectors of the Gram matrix, in float64, since this takes few small calls for a whole batch. What has to
    be stretched brings its rounding errors along, so it is repeated until nothing has to.
    """
    for turn in range(6):
        block = F.normalize(block, dim=2, eps=torch.finfo(block.dtype).tiny)
        if turn:
            block = torch.baddbmm(block, torch.bmm(block, spanned.mT), spanned, alpha=-1)
        wide = block.double()
        sizes, turns = torch.linalg.eigh(torch.bmm(wide, wide.mT))
        block = torch.bmm((turns * sizes.clamp(min=1e-12).rsqrt()[:, None]).mT.to(block.dtype), block)
        if turn and float(sizes.amin()) > 0.1:
            break
        lost = sizes < (1e-6 if turn else 1e-10)  # later on: rounding inside the span
        if bool(lost.any()):
            noise = noise.roll(spanned.shape[1] + 1, dims=2)  # as it was, it may be in the span
            block = torch.where(lost[:, :, None], noise, block)
    return block
