"""Von Mises-Fisher losses of SegSort (ICCV 2019) and HSG (CVPR 2022): pixels against prototypes of segments.

    vmf      l_i = -log e(i, own) / sum over all s of e(i, s)                          e(i, s) = exp(kappa v_i . p_s)
    vmf_nca  l_i = -log sum over C+ e(i, s) / (that sum + sum over s of another label e(i, s))
             C+: segments with the label of the pixel's own one, without it; the own one where there is no other.

The released code keeps several n x S float matrices for the backward pass. Here the loss and its gradient are computed
in closed form in one sweep over blocks of pixels; what stays are the gradients of pixels and prototypes. The release
takes the own term out of the positives by subtraction, which loses up to 3e-3 of a pixel's loss where it dominates;
here it is never added.

Code: jyhjinghwang/SegSort and twke18/HSG. Shapes: n pixels, S prototypes, m rows of memory, D dimension.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.errors import ConfigError
from common.precision import exact, real_dtype

MAX_KAPPA = 60.0
"""Above it sums of exp(kappa) leave float32; unit rows need no subtraction of a maximum below it."""

_BLOCK_BYTES = {"cpu": 1 << 20, "cuda": 512 << 20}
"""Bytes of one float block [pixels,S]; there are two."""
_MIN_PIXELS = 128
"""Pixels of a block at least: below it the products turn into memory traffic."""


def vmf(
    pixels: Tensor,
    prototypes: Tensor,
    own: Tensor,
    kappa: float,
    *,
    present: Tensor | None = None,
    reduction: str = "mean",
    block_bytes: int | None = None,
) -> Tensor:
    """Unsupervised vMF loss: minus log softmax over all segments of the batch at the own one; a scalar.

    Args:
        pixels: [n,D] unit rows. Gradient reaches them.
        prototypes: [S,D] unit rows, of all ranks. Not detached: gradient reaches them, and pixels through them.
        own: int64 [n], the row of each pixel's segment; -1 for a pixel that is left out (padding).
        kappa: concentration, at most MAX_KAPPA.
        present: bool [S], false for rows that are no segment. None: all are.
        reduction: `mean` over the pixels that count (0 where none does), or `none`: every pixel's loss [n] without
            gradient, 0 where it is left out.
        block_bytes: size of a float block in memory; the default suits the device. Changes rounding only.

    Computed in float32 without shortcuts (float64 for float64 pixels), also inside autocast. Nothing waits for the
    device.

    Raises:
        ConfigError: kappa is not in (0, MAX_KAPPA].
        ValueError: shapes that do not fit, another reduction.
    """
    _check(pixels, prototypes, own, kappa, reduction)
    plan = _Plan(
        "all", kappa, own, None if present is None else present.to(real_dtype(pixels)), None, None, block_bytes
    )
    return _run(pixels, prototypes, plan, reduction)


def vmf_nca(
    pixels: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    own: Tensor,
    kappa: float,
    *,
    memory: tuple[Tensor, Tensor] | None = None,
    nca: bool = True,
    reduction: str = "mean",
    block_bytes: int | None = None,
) -> Tensor:
    """vMF loss with neighbourhood components (vMF-NCA) over labelled segments; a scalar.

    A pixel has the label of its own segment. Labels may be classes (SegSort), or contour regions, fine and coarse
    groups made unique over pictures (HSG).

    Args:
        pixels, prototypes, own, kappa, reduction, block_bytes: as in `vmf`.
        labels: int64 [S] of the prototypes, any values from 0 on; -1 for rows that are no segment.
        memory: rows [m,D] and labels [m] of former batches (-1: empty row), appended to the prototypes as constants;
            normalised here.
        nca: False: the numerator is the own segment alone, the other segments of its label are in neither sum.

    Raises:
        ConfigError: kappa is not in (0, MAX_KAPPA].
        ValueError: shapes that do not fit, another reduction.
    """
    _check(pixels, prototypes, own, kappa, reduction)
    if labels.shape != prototypes.shape[:1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)}, expected {tuple(prototypes.shape[:1])}")
    kept = None
    if memory is not None:
        kept = F.normalize(memory[0].detach().to(real_dtype(pixels)), dim=1)
        labels = torch.cat([labels, memory[1].to(labels)])
    # Equal labels have equal ranks; ranks are exact as floats, which torch compares faster than integers.
    ranks = torch.searchsorted(labels.sort().values, labels).to(real_dtype(pixels))
    present = (labels >= 0).to(real_dtype(pixels))
    plan = _Plan("nca" if nca else "own", kappa, own, present, ranks, kept, block_bytes)
    return _run(pixels, prototypes, plan, reduction)


@dataclass(frozen=True)
class _Plan:
    """The settings of one call."""

    kind: str
    """What is compared with what: `all` (vmf), `nca`, `own` (vmf_nca without neighbourhood components)."""
    kappa: float
    own: Tensor
    present: Tensor | None
    """1 for rows of the bank that are segments, else 0; [S+m] floats."""
    ranks: Tensor | None
    """[S+m] floats, equal for rows of equal label."""
    memory: Tensor | None
    """[m,D] unit rows without gradient."""
    block_bytes: int | None


def _run(pixels: Tensor, prototypes: Tensor, plan: _Plan, reduction: str) -> Tensor:
    real = real_dtype(pixels)
    with exact(pixels.device):
        pixels, prototypes = pixels.to(real).contiguous(), prototypes.to(real).contiguous()
        if reduction == "none":
            return _sweep(pixels.detach(), prototypes.detach(), plan, None, None)
        return _Contrast.apply(pixels, prototypes, plan, torch.is_grad_enabled())


class _Contrast(torch.autograd.Function):
    """Mean loss and gradients in one sweep; the backward pass only scales what is there."""

    @staticmethod
    def forward(ctx, pixels: Tensor, prototypes: Tensor, plan: _Plan, recording: bool) -> Tensor:
        needed = [recording and need for need in ctx.needs_input_grad[:2]]
        grads = [
            torch.zeros_like(rows) if need else None for rows, need in zip((pixels, prototypes), needed, strict=True)
        ]
        losses = _sweep(pixels, prototypes, plan, *grads)
        ctx.save_for_backward(*grads)
        return (losses.sum(dtype=torch.float64) / (plan.own >= 0).sum().clamp(min=1)).to(losses.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        return *[None if grad is None else grad * scale for grad in ctx.saved_tensors], None, None


def _sweep(
    pixels: Tensor, prototypes: Tensor, plan: _Plan, grad_pixels: Tensor | None, grad_prototypes: Tensor | None
) -> Tensor:
    """Loss of every pixel [n]; gradients of their mean are added to what is given."""
    bank = prototypes if plan.memory is None else torch.cat([prototypes, plan.memory])
    height = _block_height(len(pixels), len(bank), pixels, plan.block_bytes)
    blocks = [pixels.new_empty(height, len(bank)) for _ in range(1 if plan.kind == "all" else 2)]
    share = 1.0 / (plan.own >= 0).sum().clamp(min=1).to(pixels.dtype)
    losses = []
    for first in range(0, len(pixels), height):
        rows = slice(first, min(first + height, len(pixels)))
        anchors, own = pixels[rows] * plan.kappa, plan.own[rows]
        loss, pull = _block(anchors, bank, own, plan, blocks, share)
        losses.append(loss)
        if grad_pixels is not None:
            torch.mm(pull, bank, out=grad_pixels[rows]).mul_(plan.kappa)
        if grad_prototypes is not None:
            grad_prototypes.addmm_(pull[:, : len(prototypes)].T, anchors)
    return torch.cat(losses) if losses else pixels.new_zeros(0)


def _block(
    anchors: Tensor, bank: Tensor, own: Tensor, plan: _Plan, blocks: list[Tensor], share: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss [b] of some pixels, and the gradient [b,S+m] of the mean loss towards their kappa-scaled similarities."""
    counted = (own >= 0)[:, None]
    index = own.clamp(min=0)[:, None]
    scores = torch.mm(anchors, bank.T, out=blocks[0][: len(anchors)]).exp_()
    if plan.present is not None:
        scores.mul_(plan.present)
    mine = scores.gather(1, index)
    if plan.kind == "all":
        above, below = mine, scores.sum(1, keepdim=True)
        at_own = -share
    else:
        scores.scatter_(1, index, 0.0)
        same = blocks[1][: len(anchors)]
        same.copy_(plan.ranks.expand_as(same)).eq_(plan.ranks[index]).mul_(scores)
        if plan.kind == "nca":
            positives, others = same.sum(1, keepdim=True), scores.sum(1, keepdim=True)
            alone = positives <= 0
            above, below = torch.where(alone, mine, positives), torch.where(alone, others + mine, others)
            at_own = torch.where(alone, share * (mine / below - 1), 0.0)
        else:
            scores.sub_(same)  # to zero where the label is the same: exact
            above, below = mine, scores.sum(1, keepdim=True) + mine
            at_own = share * (mine / below - 1)
    loss = torch.where(counted, below.log() - above.log(), 0.0)
    scores.mul_(torch.where(counted, share / below, 0.0))
    if plan.kind == "nca":
        scores.addcmul_(same, torch.where(counted & ~alone, share / above, 0.0), value=-1)
    scores.scatter_add_(1, index, torch.where(counted, at_own, 0.0))
    return loss.squeeze(1), scores


def _check(pixels: Tensor, prototypes: Tensor, own: Tensor, kappa: float, reduction: str) -> None:
    if not 0 < kappa <= MAX_KAPPA:
        raise ConfigError(f"kappa = {kappa}: must be above 0 and at most {MAX_KAPPA:g}")
    if pixels.dim() != 2 or pixels.shape[1:] != prototypes.shape[1:] or own.shape != pixels.shape[:1]:
        raise ValueError(
            f"pixels {tuple(pixels.shape)}, prototypes {tuple(prototypes.shape)}, own {tuple(own.shape)}: "
            "expected [n,D], [S,D], [n]"
        )
    if reduction not in ("mean", "none"):
        raise ValueError(f"reduction={reduction!r}: must be mean or none")


def _block_height(count: int, width: int, like: Tensor, block_bytes: int | None) -> int:
    """How many of `count` pixels are worked on at a time; even parts of about the size asked for."""
    wanted = block_bytes or _BLOCK_BYTES.get(like.device.type, 512 << 20)
    fitting = wanted // max(1, like.element_size() * width)
    height = max(1, fitting if block_bytes else max(fitting, _MIN_PIXELS))
    return max(1, -(-count // max(1, -(-count // height))))
