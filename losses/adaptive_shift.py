"""Correspondence of EAGLE (CVPR 2024): STEGO's, with a shift that follows the batch in place of a constant.

The shift b of a pair of views or pictures comes from the means of both cosines over the batch: for views of one picture
it is large where they are far from each other, for different pictures where both are high. Symbols as in
losses/correspondence.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common.errors import one_of
from losses.correspondence import cosines, limits, same

GRADIENTS = ("released", "detached")
"""Whether gradient reaches the codes through the shift as well, as released."""
BLOCK = 1 << 22
"""Pairs of places that are held at once, whole pictures; more are formed again in the backward pass."""


@dataclass(frozen=True)
class ShiftRule:
    """How b is made of the means of both cosines, F and S.

    Of views of one picture |F - S - bias|, of different pictures (F + S - bias) * scale.
    """

    scale: float = 3.5
    bias: float = 0.0
    gradient: str = "released"

    def __post_init__(self) -> None:
        one_of("method.shift.gradient", self.gradient, GRADIENTS)

    def shift(self, features: Tensor, codes: Tensor, positive: bool) -> Tensor:
        """b, a scalar, from the scalars F and S."""
        found = (features - codes - self.bias).abs() if positive else (features + codes - self.bias) * self.scale
        return found if self.gradient == "released" else found.detach()


@dataclass(frozen=True)
class Pair:
    """Of a batch of pairs, scalars: the mean of -clamp(S) * (F - b) over all pairs of places, b, and the mean of S."""

    loss: Tensor
    shift: Tensor
    similarity: Tensor


def adaptive_correspondence(
    features: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    rule: ShiftRule,
    positive: bool,
    *,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = True,
    average: Callable[[Tensor], Tensor] = same,
    block: int = BLOCK,
) -> Pair:
    """The loss of a pair of pictures an entry; gradient reaches the codes, see GRADIENTS.

    As the loss is linear in b, four means over the pairs give both, in one pass over blocks of pictures.

    Args:
        features, codes: of the first and of the second picture, [B,C,h,w] and [B,C,i,j], not normalised.
        positive: views of one picture; False: different pictures.
        pointwise, zero_clamp, stabilize: as `correspondence.correspondence`.
        average: turns this rank's means into those of all ranks, with gradient; a collective under several.
        block: see BLOCK.
    """
    places = [maps.shape[2] * maps.shape[3] for maps in codes]
    height = max(1, block // (places[0] * places[1]))
    parts = []
    for rows in zip(*(maps.split(height) for maps in (*features, *codes)), strict=True):
        if height < len(features[0]) and torch.is_grad_enabled():
            parts.append(checkpoint(_means, *rows, pointwise, zero_clamp, stabilize, use_reentrant=False))
        else:
            parts.append(_means(*rows, pointwise, zero_clamp, stabilize))
    own = torch.cat(parts, dim=1).mean(1)
    agreement, limited, _, _ = own
    _, _, similarity, wanted = average(own)
    shift = rule.shift(wanted.detach(), similarity, positive)
    level = wanted.detach() if pointwise else 0.0  # the batch's mean, which centred features get back
    return Pair(-(agreement + (level - shift) * limited), shift, similarity.detach())


def _means(
    one: Tensor, two: Tensor, code: Tensor, other: Tensor, pointwise: bool, zero_clamp: bool, stabilize: bool
) -> Tensor:
    """Means over the pairs of each picture [4,B]: of clamp(S) F (F centred where `pointwise`), clamp(S), S, F."""
    with torch.no_grad():
        signal = cosines(one, two)
        wanted = signal.mean((1, 2, 3, 4))
        if pointwise:
            signal -= signal.mean((3, 4), keepdim=True)
    found = cosines(code, other)
    limited = found.clamp(*limits(zero_clamp, stabilize))
    means = [part.mean((1, 2, 3, 4)) for part in (limited * signal, limited, found)]
    return torch.stack([*means, wanted])
