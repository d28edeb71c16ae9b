"""Modularity of a picture's patches under vectors that stand for groups (CAUSE, 2023): groups are learnt from a graph.

The graph of a picture has the patches as nodes and A_ij = max(0, cos(x_i, x_j)) as edges, without loops. Two patches
belong together by how much both are like one and the same vector c: Delta_ij = max over m of tanh(C_im C_jm / T) with
C_im = max(0, cos(x_i, c_m)). The loss is minus the modularity -(1/e) sum_ij (A_ij - d_i d_j / e) Delta_ij, with degrees
d and their sum e. tanh grows, so the best m is that of the product: it is searched a row of pairs at a time and the
rest is done for it alone, in memory of P x P a picture; the released form holds M x P x P several times.

ACSeg has the same idea with loops and without temperature. Code: ByungKwanLee/Causal-Unsupervised-Segmentation.
Shapes: B pictures, P patches, C channels, M vectors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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


def assignment(unit: Tensor, centres: Tensor) -> Tensor:
    """max(0, cosine) of unit vectors [B,P,C] and centres [M,C]: [B,P,M]; gradient reaches the centres."""
    return torch.matmul(unit, F.normalize(real(centres), dim=1, eps=EPS).T).clamp(min=0)


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
