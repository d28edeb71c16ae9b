"""Contrast of object masks: pixels against prototypes of objects, and the balanced loss of a salience map.

A pixel of picture b is drawn to the prototype of b's mask in a second view and away from all other prototypes. With
rows p_1..p_M of the prototypes and l_i = -log softmax(q_i . p / T) at the own row, the loss is

    sum_i w(b_i) l_i / sum_i w(b_i)        w(b) = 1 / log(1.02 + share of pixels of picture b)        (ENet's weights)

Pictures go through one after the other, each enlarged, compared and differentiated at once: of the n x M similarities
and of the enlarged codes nothing is kept for the backward pass but the gradient of the small maps.

Source: Van Gansbeke et al., MaskContrast (ICCV 2021). Shapes: B pictures, D dimension, h x w cells, H x W pixels, n
pixels of objects, M prototypes, K rows of a queue.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.precision import exact, real
from losses.correspondence import same

ENET = 1.02
_BLOCK = {"cpu": 1 << 20}
"""Similarities that are held at once: what stays in a CPU's cache; other devices want few large steps."""


@torch.no_grad()
def mask_prototypes(maps: Tensor, masks: Tensor) -> Tensor:
    """The unit mean of the unit codes of each mask, zero where it is empty: float32 [B,D], detached.

    maps [B,D,h,w] are enlarged bilinearly to masks bool [B,H,W], one picture after the other.
    """
    with exact(maps.device):
        sums = [unit_pixels(one, mask).sum(0) for one, mask in zip(real(maps), masks, strict=True)]
        return F.normalize(torch.stack(sums), dim=1)


def unit_pixels(maps: Tensor, mask: Tensor) -> Tensor:
    """Unit codes [n,D] of the pixels of a mask bool [H,W], row by row; maps [D,h,w] are enlarged to it first.

    Channels lie last in memory, so that enlarging and choosing pixels move whole codes.
    """
    large = maps[None].contiguous(memory_format=torch.channels_last)
    if large.shape[-2:] != mask.shape:
        large = F.interpolate(large, size=mask.shape, mode="bilinear", align_corners=False)
    rows = large[0].permute(1, 2, 0).reshape(mask.numel(), len(maps))
    return F.normalize(rows.index_select(0, mask.flatten().nonzero()[:, 0]), dim=1)


def class_weights(counts: Tensor) -> Tensor:
    """ENet's weight of each class by its share of the pixels, counts [M]: float32 [M]."""
    counts = counts.float()
    return 1 / (ENET + counts / counts.sum().clamp(min=1)).log()


def object_contrast(
    maps: Tensor,
    masks: Tensor,
    prototypes: Tensor,
    weights: Tensor,
    temperature: float,
    *,
    own: Tensor,
    present: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """The weighted mean loss of the pixels of the masks; a scalar, 0 with a graph where there is no pixel.

    Args:
        maps: codes [B,D,h,w]; gradient reaches them alone.
        masks: bool [B,H,W].
        prototypes: unit rows [M,D], of this batch and of a queue; constants.
        weights: [M] of each prototype as a class, see `class_weights`.
        temperature: T.
        own: int64 [B], the row of each picture's prototype.
        present: bool [M], false for rows that take no part. None: all do.
        total: what the weighted sum is divided by (several ranks: their sum); None: the sum of this batch's weights.

    Float32 (float64 for float64 maps), also inside autocast. Nothing waits for the device beside the masks' sizes.
    """
    if total is None:
        total = (masks.sum((1, 2)) * weights[own]).sum()
    constants = prototypes.detach(), weights[own], temperature, own, present, total.clamp(min=1e-12)
    return _Contrast.apply(maps, masks, torch.is_grad_enabled() and maps.requires_grad, *constants)


class _Contrast(torch.autograd.Function):
    """The loss, and the gradient of the maps, picture by picture; the backward pass only scales what is there."""

    @staticmethod
    def forward(
        ctx, maps: Tensor, masks: Tensor, recording: bool, bank: Tensor, weights: Tensor, temperature: float,
        own: Tensor, present: Tensor | None, total: Tensor,
    ) -> Tensor:  # fmt: skip
        gradients, losses = [], []
        with exact(maps.device), torch.set_grad_enabled(recording):
            for row, (one, mask) in enumerate(zip(real(maps.detach()), masks, strict=True)):
                one.requires_grad_(recording)
                pixels = unit_pixels(one, mask)
                loss, pull = _swept(pixels.detach(), bank.to(one.dtype), temperature, own[row], present)
                share = weights[row] / total
                if recording:
                    gradients.append(torch.autograd.grad(pixels, one, pull * (share / temperature))[0])
                losses.append(loss * share)
        ctx.save_for_backward(*([torch.stack(gradients).to(maps.dtype)] if gradients else []))
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale, *[None] * 8


@torch.no_grad()
def _swept(
    pixels: Tensor, bank: Tensor, temperature: float, own: Tensor, present: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum of the losses of the pixels [n,D] of one picture, and its gradient towards them times the temperature.

    own: int64 scalar, their prototype. A block of pixels is compared at a time.
    """
    rows = max(1, _BLOCK.get(pixels.device.type, 1 << 26) // max(1, len(bank)))
    loss, pull = pixels.new_zeros(()), torch.empty_like(pixels)
    for first in range(0, len(pixels), rows):
        block = slice(first, first + rows)
        logits = similarities(pixels[block], bank, temperature, present)
        most = logits.logsumexp(1)
        mine = logits.index_select(1, own[None])
        loss = loss + (most - mine[:, 0]).sum()
        logits.sub_(most[:, None]).exp_()
        pull[block] = logits @ bank - bank.index_select(0, own[None])
    return loss, pull


def similarities(pixels: Tensor, bank: Tensor, temperature: float, present: Tensor | None = None) -> Tensor:
    """Cosines of unit pixels [n,D] to unit rows [M,D], over the temperature: [n,M]; minus infinity at absent rows."""
    logits = pixels @ bank.T / temperature
    return logits if present is None else logits.masked_fill(~present, -torch.inf)


def balanced_salience(logits: Tensor, masks: Tensor, summed: Callable[[Tensor], Tensor] = same) -> Tensor:
    """Class-balanced cross-entropy of salience logits [B,h,w], enlarged bilinearly to masks bool [B,H,W]; a scalar.

    With w the share of pixels outside: (w times the sum over pixels inside + (1 - w) times that outside) / all pixels;
    0, with a graph, where there is nothing inside or nothing outside. summed: the sum over ranks of two counts, which
    makes w and the divisor those of the global batch. Float32 (float64 for float64 logits), also inside autocast.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = real(logits)
        if logits.shape[-2:] != masks.shape[-2:]:
            logits = F.interpolate(logits[:, None], size=masks.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        inside = masks.to(logits.dtype)
        counts = summed(torch.stack([inside.sum(), (1 - inside).sum()]))
        share = counts[1] / counts.sum()
        losses = F.binary_cross_entropy_with_logits(logits, inside, reduction="none")
        weights = torch.where(masks, share, 1 - share) * (counts > 0).all()
        return (weights * losses).sum() / counts.sum()


@torch.no_grad()
def object_embedding(maps: Tensor, salience: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """One vector for the object of each picture, and the object: float32 [B,D], unit or zero, and bool [B,H,W].

    Pixels whose salience logit [B,H,W] is above the threshold are added up, weighed by their logit; codes [B,D,h,w] are
    those that bilinear enlarging gives the pixels, not normalised. Enlarging is linear, so the weights are brought down
    to the cells in place of the codes up to the pixels.
    """
    objects, maps = salience > threshold, real(maps)
    weights = torch.where(objects, real(salience), 0.0).to(maps.dtype)
    with exact(maps.device):
        down, right = (shares(*sides, maps) for sides in zip(maps.shape[-2:], salience.shape[-2:], strict=True))
        cells = down @ weights @ right.T
        return F.normalize((maps * cells[:, None]).sum((2, 3)), dim=1), objects


def shares(cells: int, pixels: int, like: Tensor) -> Tensor:
    """What each of a row of cells gives to each pixel by linear enlarging: [cells,pixels]."""
    one = torch.eye(cells, dtype=like.dtype, device=like.device)[None]
    return F.interpolate(one, size=pixels, mode="linear", align_corners=False)[0]
