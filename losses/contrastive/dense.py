"""The contrastive loss by a sweep over all pairs of patches: float blocks of some anchors against all N columns.

Takes 6 N D floating-point operations an anchor for each set of codes, and 2 N (C + D) for the masks of positives. What
stays are boolean masks of one picture's anchors and the N x D gradients.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.contrastive.plan import Plan
from losses.contrastive.positives import BLOCKS, block_height, denominator_mask, fill_positives, row_blocks


def dense_sweep(sides: list[Tensor], grads: list[Tensor | None], plan: Plan) -> Tensor:
    """The loss over the plan's pictures, 0-d float64, without gradient; gradients are added to `grads`.

    sides: z and z_mix [N,D]; grads: zeros [N,D] for each that wants a gradient, else None.
    """
    loss = torch.zeros((), dtype=torch.float64, device=sides[0].device)
    sweep = _Sweep(sides[0], plan)
    for number in plan.pictures:
        picture = sweep.picture(number)
        for part in row_blocks(slice(0, plan.cells), sweep.height):
            sweep.enter(picture, part)
            for side, grad in zip(sides, grads, strict=True):
                loss += sweep.add(side, grad)
        if not plan.guarded:
            loss += torch.where(picture.kept == 0, torch.nan, 0.0).sum()
    return loss


@dataclass(frozen=True)
class _Picture:
    """What one picture's anchors need, whatever the codes."""

    start: int
    """Row of its first patch."""
    positives: list[tuple[Tensor, Tensor]]
    """A kind's mask [N_p,N] bool, and what each of its positives weighs for an anchor [N_p]."""
    denominators: Tensor
    """[N_p,N] bool."""
    mass: Tensor
    """Sum of an anchor's weights [N_p]; 0 for an anchor that is left out."""
    kept: Tensor
    """[1] int: how many anchors are kept."""


class _Sweep:
    """The steps of the sweep, and the memory they share: float blocks of some anchors, masks of a picture's anchors."""

    def __init__(self, z: Tensor, plan: Plan):
        self.plan = plan
        self.height = block_height(plan.cells, len(z), z, plan.block_bytes)
        self.blocks = [z.new_empty(self.height, len(z)) for _ in range(BLOCKS)]
        self.bits = [torch.empty(plan.cells, len(z), dtype=torch.bool, device=z.device) for _ in range(3)]

    def picture(self, number: int) -> _Picture:
        """Masks and weights of the anchors of one picture."""
        plan, start = self.plan, number * self.plan.cells
        rows = slice(start, start + plan.cells)
        counts = [
            None if kind is None else fill_positives(mask, *kind, rows, plan.symmetric, *self.blocks[:2])
            for kind, mask in zip(plan.kinds, self.bits[:2], strict=True)
        ]
        present = plan.present
        denominators = denominator_mask(self.bits[present[0]], plan.candidates, start, out=self.bits[2])
        if plan.whole and len(present) == 2:
            denominators |= self.bits[1]
        shares, mass, kept = plan.shares(counts, lambda: denominators.any(1))
        return _Picture(start, [(self.bits[i], shares[i]) for i in present], denominators, mass, kept)

    def enter(self, picture: _Picture, part: slice) -> None:
        """Turn to a block of anchors of a picture: weights and denominators as floats."""
        weights, inside, spare = (block[: part.stop - part.start] for block in self.blocks)
        (first, share), *rest = picture.positives
        # Read as bytes: torch turns bytes into floats several times faster than booleans.
        weights.copy_(first[part].view(torch.uint8)).mul_(share[part, None])
        for mask, other in rest:
            weights.addcmul_(spare.copy_(mask[part].view(torch.uint8)), other[part, None])
        inside.copy_(picture.denominators[part].view(torch.uint8))
        self.weights, self.inside, self.scores = weights, inside, spare
        self.mass = picture.mass[part]
        self.rows = slice(picture.start + part.start, picture.start + part.stop)

    def add(self, side: Tensor, grad: Tensor | None) -> Tensor:
        """The share of the block's anchors in the loss, for one set of codes; gradients are added to `grad` [N,D].

        With s the scores over temperature, W the weights, k their sum and p the softmax over the denominators, the
        loss is sum(W s) - sum(k log Z) and its gradient towards s is W - k p.
        """
        anchors, scores = side[self.rows] / self.plan.temperature, self.scores
        torch.mm(anchors, side.T, out=scores)
        attracted = torch.dot(scores.view(-1), self.weights.view(-1)).double()
        total = scores.exp_().mul_(self.inside).sum(1)
        counted = self.mass != 0
        loss = attracted - torch.where(counted, self.mass * total.log(), 0.0).sum(dtype=torch.float64)
        if grad is not None:
            pull = -self.mass / total
            if self.plan.guarded:
                pull = torch.where(counted, pull, 0.0)
            torch.addcmul(self.weights, scores, pull[:, None], out=scores)
            grad.addmm_(scores.T, anchors)
            grad[self.rows].addmm_(scores, side, alpha=1.0 / self.plan.temperature)
        return loss
