"""Local hidden positives of HP (CVPR 2023): codes mixed with their attentive 3x3 neighbours.

The weights come from the frozen backbone (attention logits of its last block, or an affinity of its features where
there is no attention) and carry no gradient. The released code multiplies an N_p x N_p matrix into an N_p x N_p x D
tensor; here only the nine weights of a patch are kept, and mixing is nine shifted additions.
"""

import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.errors import ConfigError

OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
"""The neighbourhood in the order of the last axis of the weights; entry 4 is the patch itself."""

LOW, HIGH = 0.1, 0.9
"""Quantiles of a row that its scores are clamped to."""

_ROUNDING = 1e-5
_CHUNK = 1 << 22
"""Attention entries handled at a time."""


def neighbourhood(h: int, w: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Index [N_p,9] of the 3x3 neighbours in row-major order, and valid [N_p,9]; outside the map the index is 0."""
    index, valid = _neighbourhood(h, w)
    return index.to(device), valid.to(device)


@lru_cache(maxsize=32)
def _neighbourhood(h: int, w: int) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor(OFFSETS)
    y = torch.arange(h).repeat_interleave(w)[:, None] + offsets[:, 0]
    x = torch.arange(w).repeat(h)[:, None] + offsets[:, 1]
    valid = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return torch.where(valid, y * w + x, 0), valid


@torch.no_grad()
def row_attention(scores: Tensor, sigma: float = 28.0, columns: Tensor | None = None) -> Tensor:
    """Attention [..., rows, N_p] of raw scores (rows = query): clamp, softmax, times sigma, cut below the row's mean.

    Each row is clamped to its own 10 % and 90 % quantiles (linear interpolation). `sigma` is a constant of the release,
    whatever the size of the map (hynnsk/HP). float32, no gradient; a row with a NaN is NaN.

    columns: int64 [..., rows, k], the entries of each row that are wanted, in the place of all N_p.
    """
    scores = scores.detach().float()
    ordered = _ascending(scores)
    last = ordered.shape[-1] - 1
    below, above = math.floor(LOW * last), math.floor(HIGH * last)
    low, high = (
        torch.lerp(ordered[..., at, None], ordered[..., min(at + 1, last), None], level * last - at)
        for at, level in ((below, LOW), (above, HIGH))
    )
    high = torch.where(ordered[..., -1:].isnan(), torch.nan, high)
    # A row's sum does not hang on its order: what is clamped are so many ends of the ordered row.
    total = (ordered[..., below + 1 : above + 1] - high).exp_().sum(-1, keepdim=True)
    total += (below + 1) * (low - high).exp_() + (last - above)
    wanted = scores if columns is None else scores.gather(-1, columns)
    attention = wanted.clamp(low, high).sub_(high).exp_().mul_(sigma / total)
    # Less by more than rounding: the equal entries of a flat row must not all fall below their own mean.
    return attention.masked_fill_(attention < sigma / (last + 1) * (1.0 - _ROUNDING), 0.0)


def _ascending(scores: Tensor) -> Tensor:
    """Rows in ascending order, NaN last. On CPUs numpy has vector instructions for it; torch orders indices as well."""
    return torch.from_numpy(np.sort(scores.numpy(), -1)) if scores.device.type == "cpu" else scores.sort(-1).values


@torch.no_grad()
def attention_weights(logits: Tensor, prefix: int, grid: tuple[int, int], sigma: float = 28.0) -> Tensor:
    """Weights [B,N_p,9] of each patch's 3x3 neighbours from the attention logits [B,heads,T,T] of the last block.

    `prefix` tokens (class token, registers) are dropped as query and as key, heads are averaged. Neighbours outside the
    map weigh 0. No gradient.

    Raises:
        ConfigError: T is not prefix + h*w.
    """
    h, w = grid
    if logits.shape[-1] != prefix + h * w:
        raise ConfigError(
            f"attention over {logits.shape[-1]} tokens does not fit a {h}x{w} map with {prefix} prefix tokens"
            f" ({prefix + h * w}): pass the grid and prefix of the same forward pass"
        )

    def picture_rows() -> Iterator[Iterator[Tensor]]:
        for picture in logits:
            patches = picture[:, prefix:, prefix:]
            yield (patches[:, rows].float().mean(0) for rows in _row_chunks(h * w))

    return _near_weights(picture_rows(), grid, sigma, logits.device)


@torch.no_grad()
def affinity_weights(features: Tensor, sigma: float = 28.0, spread: float = 1.0) -> Tensor:
    """The stand-in for backbones without attention: weights [B,N_p,9] from features [B,C,h,w]. No gradient.

    The scores are cosine similarities, scaled so that over all pairs of a picture their standard deviation is `spread`;
    after that the steps are those of the attention. The scaling makes up for what a cosine lacks: its spread depends on
    the backbone (0.05 after a ReLU is common), while the softmax needs differences of about one to prefer anything.
    """
    _, _, h, w = features.shape

    # Cosines near 1 are told apart by less than half precision resolves, so no autocast.
    def picture_rows() -> Iterator[Iterator[Tensor]]:
        for picture in F.normalize(features.float().flatten(2), dim=1).transpose(1, 2):
            products = picture @ picture.T if h * w * h * w <= _CHUNK else None  # else made in parts, and not kept
            scale = spread / _cosine_spread(picture, picture.T @ picture if products is None else products)
            if products is not None:
                yield iter([products.mul_(scale)])
            else:
                yield ((picture[rows] @ picture.T).mul_(scale) for rows in _row_chunks(h * w))

    with torch.autocast(features.device.type, enabled=False):
        return _near_weights(picture_rows(), (h, w), sigma, features.device)


def neighbour_mix(codes: Tensor, weights: Tensor) -> Tensor:
    """s_mix_i = (1 / c_i) sum_j w_ij s_j over the 3x3 neighbours j of i; c_i = 4, 6 or 9 counts those inside the map.

    codes [B,D,h,w], weights [B,N_p,9] -> [B,D,h,w]. Not divided by the sum of the weights. Gradient reaches the codes
    of neighbours whose weight is not 0, and never the weights (hynnsk/HP).
    """
    _, _, h, w = codes.shape
    _, valid = neighbourhood(h, w, codes.device)
    shares = weights.detach().to(codes.dtype) * (valid / valid.sum(1, keepdim=True)).to(codes.dtype)
    return _Mix.apply(codes, shares)


class _Mix(torch.autograd.Function):
    """Nine shifted multiply-adds into one map; plain autograd would keep nine maps for the backward pass."""

    @staticmethod
    def forward(ctx, codes: Tensor, shares: Tensor) -> Tensor:
        ctx.save_for_backward(shares)
        return _shifted_sum(codes, shares, gather=True)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (shares,) = ctx.saved_tensors
        return _shifted_sum(grad, shares, gather=False), None


def _shifted_sum(maps: Tensor, shares: Tensor, gather: bool) -> Tensor:
    """gather: out_i = sum_j share_ij maps_j. Otherwise its transpose: out_j = sum_i share_ij maps_i."""
    batch, _, h, w = maps.shape
    # Channels last: the inner loop runs over a patch's whole code, with one weight for all of it.
    source = maps.permute(0, 2, 3, 1).contiguous()
    shares = shares.to(source.dtype).reshape(batch, h, w, 9)
    out = torch.zeros_like(source)
    for number, (dy, dx) in enumerate(OFFSETS):
        here = (slice(None), slice(max(0, -dy), h - max(0, dy)), slice(max(0, -dx), w - max(0, dx)))
        there = (slice(None), slice(max(0, dy), h - max(0, -dy)), slice(max(0, dx), w - max(0, -dx)))
        share = shares[here][..., number, None]
        if gather:
            out[here].addcmul_(source[there], share)
        else:
            out[there].addcmul_(source[here], share)
    return out.permute(0, 3, 1, 2)


def _row_chunks(cells: int) -> Iterator[slice]:
    step = max(1, _CHUNK // cells)
    return (slice(first, min(first + step, cells)) for first in range(0, cells, step))


def _near_weights(pictures: Iterator[Iterator[Tensor]], grid: tuple[int, int], sigma: float, device) -> Tensor:
    """The nine near entries of attention rows, a chunk of full rows of scores at a time."""
    index, valid = neighbourhood(*grid, device)
    weights = []
    for rows in pictures:
        for scores, part in zip(rows, _row_chunks(len(index)), strict=True):
            weights.append(row_attention(scores, sigma, index[part]).mul_(valid[part]))
    return torch.cat(weights).reshape(-1, len(index), 9)


def _cosine_spread(rows: Tensor, moments: Tensor) -> Tensor:
    """Standard deviation of all pairwise products of unit rows [n,C]; moments: their n x n or C x C products, which
    have one sum of squares. In float64, as two near numbers are subtracted."""
    mean = rows.mean(0).double().square().sum()
    second = torch.linalg.vector_norm(moments, dim=1).double().square().sum() / len(rows) ** 2
    return (second - mean.square()).clamp_min(1e-12).sqrt()
