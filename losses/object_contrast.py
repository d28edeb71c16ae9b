"""Object loss of EAGLE (CVPR 2024): every patch is drawn to the prototype of its object, and away from the others.

Objects are segments that a cue gives (grouping/eicue.py). A patch of one view is told by the prototypes of that view
(local), and so is the patch at the same place of the other view (across).
Shapes: G groups in which a segment id means one thing (the pictures, or one group of them all), R rows of a group,
M ids, D dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import one_of
from common.precision import exact, real
from losses.correspondence import same

PROTOTYPES = ("medoid", "mean")
"""Of an object: the row with the least sum of distances to the others (of equal ones the earliest), or their mean."""
_TIE = 1e-6
"""Sums of distances that differ less, as a share, count as equal."""
_ROWS = 256
"""Rows whose distances are held at once."""


@torch.no_grad()
def patch_weights(features: Tensor) -> Tensor:
    """How much every patch of maps [B,C,h,w] counts, [B,N]: about 1 / sqrt(N), more for long features.

    The matrix of products of a picture's features has its columns divided by their norms; a patch's weight is the mean
    of its row. The matrix is formed a picture at a time, or not at all where there are fewer channels than patches.
    """
    found = []
    with exact(features.device):
        for rows in real(features).flatten(2).mT:  # [N,C]
            if rows.shape[0] > rows.shape[1]:
                norms = ((rows @ (rows.T @ rows)) * rows).sum(1).clamp(min=0).sqrt()
            else:
                norms = torch.linalg.vector_norm(rows @ rows.T, dim=0)
            found.append(rows @ (rows / norms.clamp(min=1e-12)[:, None]).mean(0))
    return torch.stack(found)


@torch.no_grad()
def medoids(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """Which row [G,R,D] of each id is the medoid, int64 [G,M], -1 for an id without rows; labels int64 [G,R].

    Rows are sorted by their id, so that blocks of them meet the rows of their own ids and few others.
    """
    groups, size = labels.shape
    ids = (labels + count * torch.arange(groups, device=labels.device)[:, None]).flatten()
    order = ids.argsort(stable=True)
    ids, points = ids[order], real(rows).flatten(0, 1)[order]
    members = ids.bincount(minlength=groups * count)
    ends = members.cumsum(0)
    means = points.new_zeros(groups * count, points.shape[1]).index_add_(0, ids, points)
    points = points - (means / members.clamp(min=1)[:, None])[ids]  # near zero a difference of products loses nothing
    firsts, lasts = (ends - members)[ids], ends[ids]
    sums = torch.empty_like(points[:, 0])
    starts = list(range(0, len(ids), _ROWS))
    stops = [min(first + _ROWS, len(ids)) for first in starts]
    reach = torch.stack([firsts[starts], lasts[[stop - 1 for stop in stops]]]).tolist()
    with exact(points.device):
        squares = points.square().sum(1)
        for first, stop, left, right in zip(starts, stops, *reach, strict=True):
            here, near = slice(first, stop), slice(left, right)
            apart = torch.addmm(squares[near][None], points[here], points[near].T, alpha=-2).add_(squares[here, None])
            apart.diagonal(first - left).zero_()  # of a row to itself
            apart = apart.clamp_(min=0).sqrt_().masked_fill_(ids[here, None] != ids[near], 0)
            sums[here] = apart.sum(1)
    least = sums.new_full((groups * count,), torch.inf).scatter_reduce(0, ids, sums, "amin")
    best = sums <= least[ids] * (1 + _TIE)
    places = order.new_full((groups * count,), groups * size).scatter_reduce(0, ids[best], order[best], "amin")
    return torch.where(members > 0, places % size, -1).view(groups, count)


def prototypes(rows: Tensor, labels: Tensor, count: int, kind: str = "medoid") -> tuple[Tensor, Tensor]:
    """The prototype of each id [G,M,D], and which ids occur, bool [G,M]; of rows [G,R,D] and labels int64 [G,R].

    Gradient reaches the rows: of a medoid the row that was chosen, of a mean all of them. Ids without rows get zeros.
    """
    one_of("method.objects.prototypes", kind, PROTOTYPES)
    rows = real(rows)
    if kind == "medoid":
        places = medoids(rows, labels, count)
        found = rows.gather(1, places.clamp(min=0)[:, :, None].expand(-1, -1, rows.shape[2]))
        return torch.where((places >= 0)[:, :, None], found, 0), places >= 0
    index = labels[:, :, None].expand_as(rows)
    members = labels.new_zeros(len(labels), count).scatter_add_(1, labels, torch.ones_like(labels))
    sums = rows.new_zeros(len(rows), count, rows.shape[2]).scatter_add(1, index, rows)
    return sums / members.clamp(min=1)[:, :, None], members > 0


@dataclass(frozen=True)
class ObjectLoss:
    """Scalars: what is differentiated, and the parts of the prototypes' own view and of the other one."""

    total: Tensor
    local: Tensor
    across: Tensor


def object_loss(
    own: Tensor,
    other: Tensor,
    labels: Tensor,
    weights: Tensor,
    table: tuple[Tensor, Tensor],
    *,
    temperature: float = 0.07,
    across: float = 0.7,
    smoothing: float = 0.0,
    average: Callable[[Tensor], Tensor] = same,
) -> ObjectLoss:
    """((1 - across) * local + across * other) / 2, each a mean of cross-entropies over this rank's rows.

    Args:
        own, other: unit rows of the prototypes' view and of the other one, [G,R,D].
        labels: int64 [G,R], the ids of the rows, all of which occur.
        weights: [G,R], constants; every row's cross-entropy counts so much.
        table: `prototypes`, [G,M,D] and bool [G,M]. Gradient reaches them too.
        smoothing: this share of a target is spread over the other ids that occur. Weights then count by their mean
            alone, as released.
        average: turns this rank's mean into that of all ranks; a collective under several.
    """
    centres, present = table
    losses = []
    with exact(own.device):
        for rows in (own, other):
            logits = real(rows) @ real(centres).mT / temperature
            logs = logits.masked_fill(~present[:, None], -torch.inf).log_softmax(2)
            chosen = logs.gather(2, labels[:, :, None])[:, :, 0]
            if not smoothing:
                losses.append(-(weights * chosen).mean())
                continue
            rest = logs.masked_fill(~present[:, None], 0).sum(2) - chosen
            others = (present.sum(1, keepdim=True) - 1).clamp(min=1)
            entropy = -((1 - smoothing) * chosen + smoothing * rest / others).mean()
            losses.append(entropy * average(weights.mean()))
    local, global_ = losses
    return ObjectLoss(((1 - across) * local + across * global_) / 2, local, global_)


def object_share(step: int, start: int, most: float) -> float:
    """u, the weight of the object loss in a step (counted from 0): 0 up to `start`, `most` afterwards. The
    correspondence has the rest."""
    return min(most, 1.0) if step > start else 0.0
