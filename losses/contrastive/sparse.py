"""The contrastive loss over the pairs alone that are positives or candidates.

With rho = 0.02 a denominator holds one patch in fifty, and an anchor has some ten positives: the other products of the
dense sweep are multiplied by zero. The two parts are

- candidates: one row pattern for all pictures, so the patches at one position of all pictures meet the same rows. Those
  are gathered once, and scores and gradients are batched products over positions;
- positives: a list of pairs (`pairs`). The loss is a function of the scores s_ij = s_ji, so a pair has one score and
  one slope, the sum of what it gets from either end as an anchor, and the gradient is a symmetric sparse matrix of
  the slopes times the codes.

A candidate that is a positive too counts among the candidates. Nothing is added in an order that chance decides: sums
over pairs run along sorted rows, on a GPU those over gathered rows too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from losses.contrastive.pairs import Pairs, find_pairs, ordered, pair_products, places, run_starts
from losses.contrastive.plan import Plan
from losses.contrastive.positives import row_blocks

_GATHER_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Rows that are gathered at a time: on a CPU they stay in its last cache, and are many enough for a call to pay."""
_SUM_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}
"""Rows of a gradient that are summed at a time."""


def all_pairs(plan: Plan, most: float | None) -> Pairs | None:
    """The positives of the plan's anchors, of every kind that is on; None as soon as there are more than `most`."""
    kinds = [plan.kinds[number] for number in plan.present]
    return find_pairs(kinds, plan.anchors, plan.symmetric, most=most)


def sparse_sum(sides: list[Tensor], grads: list[Tensor | None], plan: Plan, pairs: Pairs) -> Tensor:
    """The loss over the plan's pictures, 0-d float64, without gradient; gradients are added to `grads`.

    sides: z and z_mix [N,D]; grads: zeros [N,D] for each that wants a gradient, else None; pairs: see `all_pairs`.
    """
    ends, pattern = _Ends(pairs, plan, len(sides[0])), _Pattern(plan, sides[0])
    dtype = sides[0].dtype
    counts: list[Tensor | None] = [None, None]
    for number, marks in zip(plan.present, ends.marks, strict=True):
        counts[number] = ends.sums(marks.to(dtype))
    shares, mass, kept = plan.shares(counts, lambda: pattern.sizes() + ends.sums(ends.inside.to(dtype)) > 0)
    ends.weigh([shares[number] for number in plan.present])
    loss = torch.zeros((), dtype=torch.float64, device=mass.device)
    parts = []
    for side, grad in zip(sides, grads, strict=True):
        scores = pair_products(side, pairs.first, pairs.second, plan.anchors) / plan.temperature
        loss += ends.attracted(scores)
        near = scores.exp_()
        parts.append(_Side(side, grad, near, ends.sums(near[ends.pair] * ends.inside), torch.zeros_like(mass)))
    for positions, columns, among in pattern.blocks():
        for part in parts:
            loss += _repelled(part, plan, mass, positions, columns, among)
    for part in parts:
        if part.grad is not None:
            ends.add_gradients(part)
    return loss if plan.guarded else loss + torch.where(kept == 0, torch.nan, 0.0).sum()


@dataclass(frozen=True)
class _Side:
    """One set of codes, and what is known of it."""

    codes: Tensor
    """[N,D]."""
    grad: Tensor | None
    near: Tensor
    """exp(s) of the pairs of positives [n]."""
    near_sums: Tensor
    """What they add to the denominators of the anchors [B,N_p]."""
    pull: Tensor
    """-k / Z of the anchors [B,N_p], filled by `_repelled`: times exp(s) it is the gradient towards s."""


def _repelled(side: _Side, plan: Plan, mass: Tensor, positions: Tensor, columns: Tensor, among: Tensor) -> Tensor:
    """-k log Z of the anchors at some positions, summed; the candidates' gradients are added, and `pull` is noted.

    positions [P]; columns [P,K], their candidates; among [P,K,B], 1 where an entry is a candidate of the anchor.
    """
    width = side.codes.shape[1]
    maps = side.codes[plan.anchors].unflatten(0, (-1, plan.cells))
    anchors = maps.index_select(1, positions).transpose(0, 1) / plan.temperature  # [P,B,D]
    others = side.codes.index_select(0, columns.flatten()).unflatten(0, columns.shape)  # [P,K,D]
    scores = torch.bmm(others, anchors.transpose(1, 2)).exp_().mul_(among)
    total = scores.sum(1) + side.near_sums[:, positions].T
    own = mass[:, positions].T
    counted = own != 0
    loss = -torch.where(counted, own * total.log(), 0.0).sum(dtype=torch.float64)
    if side.grad is None:
        return loss
    pull = -own / total
    if plan.guarded:
        pull = torch.where(counted, pull, 0.0)
    else:  # as released: an empty denominator spoils all gradients
        side.grad.add_(torch.where((total == 0).any(), torch.nan, 0.0))
    side.pull[:, positions] = pull.T
    scores.mul_(pull[:, None])
    moved = torch.bmm(scores.transpose(1, 2), others)
    side.grad[plan.anchors].unflatten(0, (-1, plan.cells)).index_add_(
        1, positions, moved.transpose(0, 1), alpha=1.0 / plan.temperature
    )
    _add_rows(side.grad, columns.flatten(), torch.bmm(scores, anchors, out=others).view(-1, width))
    return loss


def _add_rows(grad: Tensor, index: Tensor, rows: Tensor) -> None:
    """grad[index] += rows, one after the other on a CPU."""
    if grad.device.type == "cpu":
        grad.index_add_(0, index, rows)
    else:
        _add_runs(grad, index, rows)


def _add_runs(grad: Tensor, index: Tensor, rows: Tensor) -> None:
    """The same in sorted runs of equal places, so without atomic additions."""
    order = index.argsort(stable=True)
    grad += F.embedding_bag(order, rows, run_starts(index, len(grad)), mode="sum", include_last_offset=True)


class _Pattern:
    """The random candidates by position in a picture."""

    def __init__(self, plan: Plan, like: Tensor):
        self.plan, self.like = plan, like
        if plan.candidates is None:
            self.counts = torch.full((plan.cells,), len(like), device=like.device)
            self.columns = torch.arange(len(like), device=like.device)
            self.starts = torch.zeros_like(self.counts)
            return
        rows, self.columns = places(plan.candidates)
        offsets = run_starts(rows, plan.cells)
        self.starts, self.counts = offsets[:-1], offsets.diff()

    def sizes(self) -> Tensor:
        """Candidates of the anchors, themselves left out, [B,N_p]."""
        plan = self.plan
        rows = torch.arange(plan.anchors.start, plan.anchors.stop, device=self.like.device)
        own = torch.ones_like(rows) if plan.candidates is None else plan.candidates[rows % plan.cells, rows]
        return self.counts - own.to(self.counts.dtype).view(-1, plan.cells)

    def blocks(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Positions [P], the rows of their candidates [P,K], and which count [P,K,B]; positions of like counts go
        together, so that little is filled up."""
        plan, like = self.plan, self.like
        pictures = torch.arange(plan.anchors.start, plan.anchors.stop, plan.cells, device=like.device)
        counts, order = self.counts.sort()
        largest = counts.tolist()
        wanted = plan.block_bytes or _GATHER_BYTES.get(like.device.type, 256 << 20)
        height = max(1, int(wanted / (like.element_size() * like.shape[1] * max(1.0, sum(largest) / len(largest)))))
        for part in row_blocks(slice(0, plan.cells), height):
            positions, lane = order[part], torch.arange(largest[part.stop - 1], device=like.device)
            there = lane < counts[part, None]
            columns = self.columns[torch.where(there, self.starts[positions, None] + lane, 0)]
            own = columns[:, :, None] == (positions[:, None] + pictures)[:, None]
            yield positions, columns, (there[:, :, None] & ~own).to(like.dtype)


class _Ends:
    """Pairs of positives from both of their ends: 2 n entries, sorted by the patch at whose end they are."""

    def __init__(self, pairs: Pairs, plan: Plan, total: int):
        self.plan = plan
        start, stop = plan.anchors.start, plan.anchors.stop
        count = len(pairs.first)
        rows, columns = torch.cat([pairs.first, pairs.second]), torch.cat([pairs.second, pairs.first])
        order = ordered(rows, total)
        self.columns, self.offsets = columns[order], run_starts(rows, total)
        rows = rows[order]
        back = order >= count
        self.pair = torch.where(back, order - count, order)
        place = torch.empty_like(order)
        place[order] = torch.arange(2 * count, device=order.device)
        self.places = place[:count], place[count:]
        """Where a pair's two entries are."""
        bits = pairs.bits[self.pair]
        kinds = range(len(plan.present))
        self.marks = [torch.where(back, bits >> (2 * kind + 1), bits >> (2 * kind)) & 1 != 0 for kind in kinds]
        """Whether the other end is a positive of this one, for every kind; never of a patch that is no anchor."""
        self.anchor = (rows - start).clamp(0, stop - start - 1)
        inside = self.marks[0] | self.marks[-1] if plan.whole else self.marks[0]
        if plan.candidates is None:
            inside = torch.zeros_like(inside)
        else:
            positions = torch.arange(plan.cells, device=rows.device).repeat(total // plan.cells)
            inside = inside & ~plan.candidates[positions[rows], self.columns]
        self.inside = inside
        """Whether it is in this one's denominator by that alone: not among the candidates."""

    def sums(self, values: Tensor) -> Tensor:
        """Sums of the entries' values [2n] at the anchors, [B,N_p]."""
        sums = torch.segment_reduce(values, "sum", offsets=self.offsets, unsafe=True)
        return sums[self.plan.anchors].view(-1, self.plan.cells)

    def weigh(self, shares: list[Tensor]) -> None:
        """What the entries weigh, from what a positive of each kind weighs for each anchor [B,N_p]."""
        parts = [marks * share.flatten()[self.anchor] for marks, share in zip(self.marks, shares, strict=True)]
        self.weights = sum(parts[1:], parts[0])

    def attracted(self, scores: Tensor) -> Tensor:
        """Sum of weight and score of all entries; scores [n] of the pairs."""
        return (self.weights * scores[self.pair]).sum(dtype=torch.float64)

    def add_gradients(self, side: _Side) -> None:
        """Add what the codes get as ends of the pairs: a symmetric sparse matrix times the codes."""
        slopes = self.weights + side.pull.flatten()[self.anchor] * side.near[self.pair] * self.inside
        ahead, back = self.places
        values = ((slopes[ahead] + slopes[back]) / self.plan.temperature)[self.pair]
        total, width = side.codes.shape
        wanted = _SUM_BYTES.get(side.codes.device.type, 256 << 20)
        parts = list(row_blocks(slice(0, total), max(1, wanted // (side.codes.element_size() * width))))
        edges = self.offsets[[0, *(part.stop for part in parts)]].tolist()
        for part, first, last in zip(parts, edges, edges[1:], strict=False):
            side.grad[part] += F.embedding_bag(
                self.columns[first:last],
                side.codes,
                self.offsets[part.start : part.stop + 1] - first,
                mode="sum",
                per_sample_weights=values[first:last],
                include_last_offset=True,
            )
