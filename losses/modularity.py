"""Modularity of a picture's patches under vectors that stand for groups: groups are learnt from a graph.

The graph of a picture has the patches as nodes and A_ij = max(0, cos(x_i, x_j)) as edges. Two patches belong together
by how much both are like one and the same vector c, with C_im = max(0, cos(x_i, c_m)); the loss is minus the modularity
-(1/e) sum_ij (A_ij - d_i d_j / e) Delta_ij, with degrees d and their sum e.

CAUSE (Kim et al., 2023): many vectors for all pictures, no loops in the graph, Delta_ij = max over m of
tanh(C_im C_jm / T). tanh grows, so the best m is that of the product: it is searched a row of pairs at a time and the
rest is done for it alone, in memory of P x P a picture; the released form holds M x P x P several times. Code:
ByungKwanLee/Causal-Unsupervised-Segmentation.

ACSeg (Li et al., CVPR 2023, section 3): few vectors of each picture's own, loops, Delta_ij = max over m of C_im C_jm.
The graph is a constant, so the gradient is known in the forward pass and nothing of P x P is kept for the backward one.

Shapes: B pictures, P patches, C channels, M vectors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.precision import exact, real

EPS = 1e-12
CACHED, LARGE = 1 << 18, 1 << 24
"""Products that are held at once while winners are searched: on a CPU what fits its cache, else what keeps a GPU
busy."""


def modularity_loss(vectors: Tensor, centres: Tensor, temperature: float = 0.1, *, guarded: bool = True) -> Tensor:
    """Minus the modularity, a mean over pictures; a scalar, float32 (float64 stays).

    Args:
        vectors: what the graph is made of, [B,P,C]; a constant.
        centres: the vectors that stand for groups, [M,C], any length. They alone get gradient, each through the pairs
            that it wins.
        temperature: T.
        guarded: a picture without an edge counts 0; else it makes the loss NaN, as released. It is counted either way.
    """
    with exact(centres.device):
        unit = F.normalize(real(vectors.detach()), dim=2, eps=EPS)
        weights = modularity(unit, guarded=guarded)[0]
        likeness = assignment(unit, centres)
        return -(weights * together(likeness, temperature)).sum((1, 2)).mean()


def modularity(unit: Tensor, *, guarded: bool = True) -> tuple[Tensor, Tensor]:
    """(A - d d' / e) / e of unit vectors [B,P,C], [B,P,P], and e [B]. See `modularity_loss` for `guarded`."""
    edges = torch.bmm(unit, unit.mT).clamp_(min=0)
    edges.diagonal(dim1=1, dim2=2).zero_()
    degrees = edges.sum(2)
    total = degrees.sum(1)
    share = total.where(total > 0, 1.0) if guarded else total
    expected = degrees[:, :, None] * (degrees / share[:, None])[:, None]
    return (edges - expected) / share[:, None, None], total


def cosines(unit: Tensor, centres: Tensor) -> Tensor:
    """Of unit vectors [B,P,C] and centres of any length, [M,C] or each picture's own [B,M,C]: [B,P,M], float32 (float64
    stays); gradient reaches the centres."""
    with exact(unit.device):
        return torch.matmul(unit, F.normalize(real(centres), dim=-1, eps=EPS).mT)


def assignment(unit: Tensor, centres: Tensor) -> Tensor:
    """max(0, cosine), see `cosines`."""
    return cosines(unit, centres).clamp(min=0)


def together(likeness: Tensor, temperature: float) -> Tensor:
    """Delta [B,P,P] of likenesses [B,P,M] >= 0; gradient through the winner of each pair."""
    own = likeness.gather(2, winners(likeness.detach()))
    return torch.tanh(own * own.mT / temperature)


@torch.no_grad()
def winners(likeness: Tensor) -> Tensor:
    """The m of the largest product of rows i and j of [B,P,M]: int64 [B,P,P], symmetric."""
    pictures, patches, _ = likeness.shape
    found = torch.empty(pictures, patches, patches, dtype=torch.int64, device=likeness.device)
    room = CACHED if likeness.device.type == "cpu" else LARGE
    block = max(1, room // max(1, likeness[0].numel()))
    for rows, won in zip(likeness.split(block), found.split(block), strict=True):
        for i in range(patches):
            best = (rows[:, i : i + 1] * rows[:, i:]).max(2).indices
            won[:, i, i:] = best
            won[:, i:, i] = best
    return found


def concept_modularity(vectors: Tensor, concepts: Tensor) -> Tensor:
    """Minus the modularity of each picture under its own concepts (ACSeg): [B], float32 (float64 stays), once
    differentiable; from 0 down to about -1.

    Args:
        vectors: what the graph is made of, [B,P,C]; a constant. A picture of zero vectors alone counts 0.
        concepts: [B,M,C], any length. They alone get gradient, each through the pairs that it wins.
    """
    with exact(concepts.device):
        unit = F.normalize(real(vectors.detach()), dim=2, eps=EPS)
        return _ConceptModularity.apply(unit, assignment(unit, concepts))


class _ConceptModularity(torch.autograd.Function):
    """Of unit vectors [B,P,C] and likenesses [B,P,M] >= 0, some rows of the graph at a time."""

    @staticmethod
    def forward(ctx: Any, unit: Tensor, likeness: Tensor) -> Tensor:
        pictures, patches, count = likeness.shape
        room = CACHED if unit.device.type == "cpu" else LARGE
        blocks = torch.arange(patches, device=unit.device).split(max(1, room // max(1, pictures * patches)))
        degrees = torch.cat([_edges(unit, rows).sum(2) for rows in blocks], dim=1)
        total = degrees.sum(1)
        share = total.where(total > 0, 1.0)
        loss, slope = torch.zeros_like(total), torch.empty_like(likeness)
        for rows in blocks:
            weights = _edges(unit, rows) - degrees[:, rows, None] * (degrees / share[:, None])[:, None]
            own = likeness[:, rows]
            best, winner = own[:, :, :1] * likeness[:, None, :, 0], None
            for m in range(1, count):
                product = own[:, :, m, None] * likeness[:, None, :, m]
                better = product > best
                winner = better.byte() * m if winner is None else winner.masked_fill_(better, m)
                best = torch.where(better, product, best)
            loss -= (weights * best).sum((1, 2))
            for m in range(count):  # each pair is there twice, as i, j and as j, i
                won = weights if winner is None else weights * (winner == m)
                slope[:, rows, m] = -2 * (won @ likeness[:, :, m, None]).squeeze(2)
        ctx.save_for_backward(slope / share[:, None, None])
        return loss / share

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[:, None, None] * ctx.saved_tensors[0]


def _edges(unit: Tensor, rows: Tensor) -> Tensor:
    """Rows [B,r,P] of the graph with loops."""
    return torch.bmm(unit[:, rows], unit.mT).clamp_(min=0)
