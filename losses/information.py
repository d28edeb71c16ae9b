"""Mutual information between the classes of a pixel and those of near pixels of a changed copy (IIC, ICCV 2019).

Everything is float32 (float64 for float64 maps), whatever the precision of the networks. Shapes: K classes, d the half
side of the box of shifts, S = (2d+1)^2 shifts.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.fft import next_fast_len
from torch import Tensor

from common.distributed import EVERYONE, Reach
from common.precision import exact, real

SMALLEST = 2.220446049250313e-16
"""Probabilities are taken for at least this (the release: what double precision adds to 1)."""
BY_PIXELS = 2
"""Half sides up to which shifted maps are multiplied; beyond, spectra cost less."""
LEAST_SEEN = 1e-5
"""Share of the most that any shift sees, below which a shift counts as seeing nothing."""


@dataclass
class Information:
    """What `mutual_information` gives; scalars with gradient."""

    loss: Tensor
    plain: Tensor
    """The same with a balance weight of 1: the negative mutual information, -log K at best."""
    seen: Tensor
    """Bool, without gradient: whether any pixel was left by the masks. Where none was, both losses are 0."""


def mutual_information(
    first: Tensor,
    second: Tensor,
    half_side: int,
    balance: float = 1.0,
    collapsed: bool = False,
    mask: Tensor | None = None,
    to_first: Tensor | None = None,
    align_corners: bool = True,
    sparse_shift: tuple[int, int] = (0, 0),
    reach: Reach = EVERYONE,
) -> Information:
    """Negative mutual information of class maps, over all shifts of up to `half_side` pixels along each axis.

    Args:
        first, second: probabilities [B,K,H,W] of the pictures and of their copies; both carry gradient.
        half_side: d.
        balance: weight of the entropies of both marginals (lambda).
        collapsed: one joint distribution of all shifts together, divided by its detached total; else one a shift, each
            divided by its own total, and the mean of their losses (all published runs for segmentation).
        mask: [B,H,W], of the pictures: pixels that are looked at; both maps are multiplied by it.
        to_first: affine maps [B,2,3] in the unit coordinates of `grid_sample`, from which the copies are brought back
            into the frame of the pictures (bilinear, 0 outside); None: they are in it.
        align_corners: whether these coordinates end at the centres of the outermost pixels (as in torch 0.4, which the
            release ran on) or at their outer edges.
        sparse_shift: one more shift (x, y) px of all copies, see `shifted`.
        reach: the ranks whose pictures make up the joint distributions.
    """
    first, second = real(first), real(second)
    if to_first is not None:
        second = brought_back(second, to_first, align_corners)
    if any(sparse_shift):
        second = shifted(second, *sparse_shift)
    if mask is not None:
        first, second = (values * mask[:, None].to(values.dtype) for values in (first, second))
    joint = joint_of_box(first, second, half_side)[None] if collapsed else joint_of_shifts(first, second, half_side)
    return information(reach.summed(joint), balance, collapsed)


def information(joint: Tensor, balance: float = 1.0, collapsed: bool = False) -> Information:
    """The losses of unnormalised joint distributions [S,K,K]; see `mutual_information`.

    Each distribution is made symmetric, and what is below `SMALLEST` in it or in its marginals is set to that without
    gradient. A shift that no pixel is left for adds nothing (the release divides 0 by 0 there).
    """
    if collapsed:
        joint = joint.sum(0, keepdim=True)
    totals = joint.sum((1, 2), keepdim=True)
    seen = totals.detach() > LEAST_SEEN * totals.detach().amax().clamp_min(SMALLEST)
    divisors = torch.where(seen, totals.detach() if collapsed else totals, 1.0)
    loss, plain = (
        _negative(joint / divisors, weight, SMALLEST)[seen].sum() / seen.sum().clamp_min(1) for weight in (balance, 1.0)
    )
    return Information(loss, plain, seen.any())


def information_of_counts(joint: Tensor, pairs: int, smallest: float = 1e-10) -> Tensor:
    """What the reproduction of the autoregressive method (ECCV 2020) takes of a joint distribution [K,K] that is not
    normalised: with its total S, `pairs` (pictures times shifts) and the information I, S (log S - I) / pairs.

    S does not change where maps add up to one over classes: then the gradient is that of `information`, times
    S / pairs. Counts below `smallest` are set to it without gradient.
    """
    return _negative(joint[None], 1.0, smallest).sum() / pairs


def _negative(joint: Tensor, balance: float, smallest: float) -> Tensor:
    """-P (log P - balance (log p + log q)) of joint distributions [S,K,K] made symmetric, summed: [S,1,1]."""
    joint = (joint + joint.mT) / 2
    rows, columns = (joint.sum(axis, keepdim=True).clamp_min(smallest).log() for axis in (2, 1))
    joint = joint.clamp_min(smallest)
    return (joint * (balance * (rows + columns) - joint.log())).sum((1, 2), keepdim=True)


def joint_of_shifts(first: Tensor, second: Tensor, half_side: int) -> Tensor:
    """Unnormalised joint distributions of two maps [B,K,H,W] at all shifts: [S,K,K], shifts row by row.

    Entry (s, i, j), with s the shift (y, x), -d to d each: the sum over pictures and pixels u of first_i(u + s) times
    second_j(u); pixels outside are 0. Few shifts are one matrix product of shifted maps; more are a product of K x K
    for each frequency of the maps, whose number does not grow with that of the shifts (its rounding, some 1e-7 of the
    largest entry, matters to no pixel: it falls on pairs of classes that hardly meet).
    """
    with exact(first.device):
        return (_by_pixels if half_side <= BY_PIXELS else _by_frequencies)(first, second, half_side)


def joint_of_box(first: Tensor, second: Tensor, half_side: int) -> Tensor:
    """The sum of `joint_of_shifts` over all shifts, [K,K], at the cost of one of them: the second maps meet the sums of
    the first maps over the box around each pixel."""
    with exact(first.device):
        rows, columns = (_band(first, side, half_side) for side in first.shape[-2:])
        boxes = rows @ first @ columns
        return boxes.transpose(0, 1).flatten(1) @ second.transpose(0, 1).flatten(1).T


def _band(maps: Tensor, side: int, half_side: int) -> Tensor:
    """[side,side] of the maps' type: 1 where row and column are at most `half_side` apart, else 0. A product with it is
    several times faster than pooling, whose cost grows with the box."""
    places = torch.arange(side, device=maps.device)
    return ((places[:, None] - places).abs() <= half_side).to(maps.dtype)


def _by_pixels(first: Tensor, second: Tensor, half_side: int) -> Tensor:
    """The first maps shifted along x against the second ones shifted along y: all shifts are pairs of these."""
    side, classes = 2 * half_side + 1, first.shape[1]
    height, width = first.shape[-2:]
    across = F.pad(first, (half_side, half_side)).unfold(3, width, 1).permute(3, 1, 0, 2, 4)  # column + x
    down = F.pad(second, (0, 0, half_side, half_side)).unfold(2, height, 1).flip(2).permute(2, 1, 0, 4, 3)  # row - y
    joint = across.reshape(side * classes, -1) @ down.reshape(side * classes, -1).T
    return joint.view(side, classes, side, classes).permute(2, 0, 1, 3).reshape(-1, classes, classes)


def _by_frequencies(first: Tensor, second: Tensor, half_side: int) -> Tensor:
    """A correlation is a product of spectra; of its values only those of the shifts are turned back, by two products.

    The maps are transformed with room for `half_side` zeros, so that no shift meets what lies at the other end.
    """
    classes = first.shape[1]
    rows, columns = (next_fast_len(length + half_side, real=True) for length in first.shape[-2:])
    spectra = [torch.fft.rfft2(maps, s=(rows, columns)).flatten(2) for maps in (first, second)]
    products = spectra[0].permute(2, 1, 0) @ spectra[1].permute(2, 0, 1).conj()  # [frequencies,K,K]
    shifts = torch.arange(-half_side, half_side + 1, dtype=torch.float64, device=first.device)[:, None]
    down = 2 * math.pi / rows * shifts * torch.arange(rows, device=first.device)
    across = 2 * math.pi / columns * shifts * torch.arange(columns // 2 + 1, device=first.device)
    twice = torch.full_like(across, 2 / (rows * columns))  # a real map's other half of frequencies says the same again
    twice[:, 0] /= 2
    if columns % 2 == 0:
        twice[:, -1] /= 2
    turned = torch.polar(torch.ones_like(down), down).to(products.dtype) @ products.reshape(rows, -1)
    turned = torch.view_as_real(turned).view(len(shifts), -1, classes * classes, 2)
    waves = torch.stack([twice * across.cos(), -twice * across.sin()], dim=2).to(first.dtype)
    return torch.einsum("yfkc,xfc->yxk", turned, waves).reshape(-1, classes, classes)


def brought_back(maps: Tensor, to_first: Tensor, align_corners: bool) -> Tensor:
    """Maps [B,K,H,W] sampled at affine maps [B,2,3] of their own grid; bilinear, 0 outside."""
    grid = F.affine_grid(to_first.to(maps.dtype), list(maps.shape), align_corners=align_corners)
    return F.grid_sample(maps, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners)


def shifted(maps: Tensor, x: int, y: int) -> Tensor:
    """Maps [B,C,H,W] whose value at (row, column) is the one at (row + y, column + x); 0 from outside."""
    height, width = maps.shape[-2:]
    padded = F.pad(maps, (abs(x), abs(x), abs(y), abs(y)))
    top, left = abs(y) + y, abs(x) + x
    return padded[..., top : top + height, left : left + width]
