"""Concept-wise contrast of CAUSE (2023): patches of like concepts are drawn together, of unlike ones kept apart.

A patch's concept is the vector of a frozen book that it is nearest to. Which concepts are alike is a table of the book
alone, so masks of pairs are looked up by concept. What the positives of an anchor pull with is a sum over concepts, not
over pairs; only the denominator needs the cosines of pairs, and those are done in blocks of anchors, gradient included.

Code: ByungKwanLee/Causal-Unsupervised-Segmentation. B pictures, P patches, E channels, M concepts, N candidates.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.precision import exact, real

EPS = 1e-12
CACHED, LARGE = 1 << 21, 1 << 26
"""Pairs of patches that are held at once, on a CPU and on a GPU (8 and 256 MiB in float32)."""
REACH = 50.0
"""The largest exponent: sums of exp(REACH) over any bank stay below the end of float32, cosines of -1 above 0."""


@dataclass(frozen=True)
class Likeness:
    """Which concepts are alike and which are not, bool [M,M] both; pairs of neither kind are left out."""

    near: Tensor
    far: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, book: Tensor, near: float, far: float) -> "Likeness":
        """Of a book [M,C]: concepts with a cosine above `near` are alike, below `far` they are not."""
        cosines = between(book)
        return cls(cosines > near, cosines < far)


@torch.no_grad()
def between(book: Tensor) -> Tensor:
    """Cosines of all concepts of a book [M,C]: [M,M], float32 (float64 stays)."""
    with exact(book.device):
        unit = F.normalize(real(book), dim=1, eps=EPS)
        return unit @ unit.T


@torch.no_grad()
def nearest(vectors: Tensor, book: Tensor) -> Tensor:
    """The concept of each vector [...,C], by cosine to the book [M,C]: int64 [...]."""
    with exact(book.device):
        unit = F.normalize(real(book), dim=1, eps=EPS)
        return (F.normalize(real(vectors), dim=-1, eps=EPS) @ unit.T).argmax(-1)


def concept_contrast(
    anchors: Tensor,
    concepts: Tensor,
    candidates: Tensor,
    of: Tensor,
    likeness: Likeness,
    temperature: float = 0.07,
    *,
    first: int | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The term of each picture [B], and the number of its positive pairs [B]; without any the term is 0.

    A term is the mean over the positive pairs (i, j) of a picture of -l_ij + log of the sum of exp(l) over all
    positives and negatives of i, with l = cosine / temperature. An anchor with many positives weighs more.

    Args:
        anchors: student projections, [B,P,E], any length; they alone get gradient.
        concepts: theirs, int64 [B,P].
        candidates: teacher projections or rows of a bank, [N,E]; a constant.
        of: their concepts, int64 [N].
        first: the candidate that is the first anchor itself, the others follow it; none is paired with itself. None:
            no anchor is among the candidates.
        block: pairs that are held at once; changes no value.
    """
    with exact(anchors.device):
        z = F.normalize(real(anchors), dim=2, eps=EPS).flatten(0, 1)
        rows = F.normalize(real(candidates.detach()), dim=1, eps=EPS)
        own = concepts.flatten()
        near = likeness.near[own].to(z.dtype)
        count = near @ of.bincount(minlength=len(likeness.near)).to(z.dtype)
        pull = near @ z.new_zeros(len(likeness.near), z.shape[1]).index_add_(0, of, rows)
        if first is not None:
            itself = likeness.near.diagonal()[own].to(z.dtype)
            count = count - itself
            pull = pull - itself[:, None] * rows[first : first + len(own)]
        kept = (likeness.near | likeness.far).to(z.dtype)
        spread = _LogSumExp.apply(z, rows, own, of, kept, temperature, first, block)
        pairs = count.unflatten(0, concepts.shape).sum(1)
        summed = (count * spread - (z * pull).sum(1) / temperature).unflatten(0, concepts.shape).sum(1)
        return summed / pairs.clamp(min=1), pairs


class _LogSumExp(torch.autograd.Function):
    """log sum exp of cosine / temperature over the kept candidates of every anchor [A]; 0 where there are none.

    The gradient by the anchors is a mean of the candidates, which the forward pass makes in the same blocks.
    """

    @staticmethod
    def forward(ctx, z, rows, own, of, kept, temperature, first, block):
        wanted = ctx.needs_input_grad[0]
        parts, means = [], []
        block = (CACHED if z.device.type == "cpu" else LARGE) if block is None else block
        step = max(1, block // max(1, len(rows)))
        shift = max(0.0, 1 / temperature - REACH)
        for start in range(0, len(z), step):
            shares = (z[start : start + step] @ rows.T).div_(temperature).sub_(shift).exp_()
            shares *= kept[own[start : start + step]].index_select(1, of)
            if first is not None:
                at = torch.arange(len(shares), device=z.device)
                shares[at, first + start + at] = 0
            sums = shares.sum(1)
            some = sums > 0
            parts.append((sums.log() + shift).where(some, 0.0))
            if wanted:
                means.append((shares @ rows) / (sums.where(some, 1.0) * temperature)[:, None])
        if wanted:
            ctx.save_for_backward(torch.cat(means))
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad[:, None], *[None] * 7
