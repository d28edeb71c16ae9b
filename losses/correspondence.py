"""Feature correspondence of STEGO (ICLR 2022): similarities of codes copy those of frozen features, sharpened.

Between a picture and itself, a near picture, and random pictures: the cosines of all pairs of sampled patches say how
much two codes should agree. Method document section 3. Shapes: S sample points a side, so S*S points of a picture;
R random pictures an anchor; all else as in common/spec.py.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import chance
from common.errors import one_of
from common.precision import real, real_dtype

EPS = 1e-10
"""Smallest norm that a feature or a code is divided by, as released."""
CEILING = 0.8
"""Code similarities above it are not pushed further up under `stabilize`, as released."""

NEGATIVES = ("shifted", "cycle")


def same(mean: Tensor) -> Tensor:
    """The average over ranks of a value that only one process has."""
    return mean


def random_points(seed: int, purpose: str, step: int, count: int, side: int) -> Tensor:
    """Sample points of `count` pictures (the global batch): [count,S,S,2], x and y uniform in [-1,1], on the CPU."""
    uniform = torch.rand(count, side, side, 2, generator=chance.generator(seed, purpose, step))
    return uniform * 2 - 1


def sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of maps [B,C,h,w] at points [B,S,S,2], as [B,C,S,S]; gradient flows to the maps.

    -1 and 1 are the centres of the border cells (align_corners). The value at place (i, j) is that at points[b,j,i]:
    the released code swaps the two axes, so one set of points always meets the same patches.
    """
    return F.grid_sample(maps, points.transpose(1, 2), mode="bilinear", padding_mode="border", align_corners=True)


def shifted(order: Tensor) -> Tensor:
    """The released "super permutation" of random permutations [...,B]: fixed points move on by one, modulo B.

    No picture is its own negative for B > 1, but some serve twice, so it is no permutation.
    """
    count = order.shape[-1]
    return (order + (order == torch.arange(count, device=order.device)).long()) % count


def cycle(order: Tensor) -> Tensor:
    """Random permutations [...,B] read as one cycle each: the negative of order[i] is order[i + 1].

    A true permutation without fixed points (B > 1).
    """
    return torch.empty_like(order).scatter_(-1, order, order.roll(-1, -1))


def random_negatives(seed: int, step: int, repeats: int, count: int, kind: str = "shifted") -> Tensor:
    """Which picture of the global batch is the negative of which: int64 [R,count], drawn by (seed, step, repetition).

    kind: `shifted` as released, or `cycle`. A single picture is its own negative.

    Raises:
        ConfigError: another kind.
    """
    one_of("method.negatives.draw", kind, NEGATIVES)
    orders = [
        torch.randperm(count, generator=chance.generator(seed, "stego.negatives", step, r)) for r in range(repeats)
    ]
    order = torch.stack(orders)
    return shifted(order) if kind == "shifted" else cycle(order)


def cosines(one: Tensor, two: Tensor) -> Tensor:
    """Cosine of every place of one [B,C,h,w] with every place of two [B,C,i,j]: [B,h,w,i,j], float32."""
    with torch.autocast(one.device.type, enabled=False):
        first, second = (F.normalize(maps.to(real_dtype(maps)), dim=1, eps=EPS).flatten(2) for maps in (one, two))
        return torch.bmm(first.transpose(1, 2), second).reshape(len(one), *one.shape[2:], *two.shape[2:])


def correspondence(
    features: tuple[Tensor, Tensor],
    codes: tuple[Tensor, Tensor],
    shift: float,
    *,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
    average: Callable[[Tensor], Tensor] = same,
) -> tuple[Tensor, Tensor]:
    """Loss tensor and code cosines of one pair of pictures an entry, both [B,h,w,i,j].

    -clamp(S) * (F - shift), with S and F the cosines of codes and of features. Gradient reaches the codes only.

    Args:
        features, codes: of the first and of the second picture, [B,C,h,w] and [B,C,i,j], not normalised.
        shift: b, how similar features must be for codes to be drawn together.
        pointwise: F is centred over the second picture's places for every place of the first, then the mean of the
            whole batch is added back. The paper does not add it back; the released shifts want it.
        zero_clamp: S below 0 is not pushed further apart.
        stabilize: S above 0.8 is not drawn further together.
        average: turns this rank's mean into that of all ranks; a collective under several.
    """
    with torch.no_grad():
        wanted = cosines(*features)
        if pointwise:
            # What is left after the centring has mean zero, so that the batch's mean is all there is to put back.
            wanted = wanted - wanted.mean(dim=(3, 4), keepdim=True) + average(wanted.mean())
    found = cosines(*codes)
    limited = found.clamp(min=0.0 if zero_clamp else -1e4, max=CEILING if stabilize else None)
    return -limited * (wanted - shift), found


@dataclass(frozen=True)
class Term:
    """Weight and shift of one kind of pair; a weight of 0 leaves it out."""

    weight: float
    shift: float


@dataclass(frozen=True)
class Correspondence:
    """The loss and what it is made of. `losses` and `similarities` (mean code cosine) by kind: self, knn, random."""

    total: Tensor
    losses: dict[str, Tensor]
    similarities: dict[str, Tensor]


def correspondence_loss(
    features: Tensor,
    codes: Tensor,
    near: tuple[Tensor, Tensor] | None,
    pool: tuple[Tensor, Tensor],
    points: tuple[Tensor, Tensor],
    negatives: Tensor,
    terms: dict[str, Term],
    **rules,
) -> Correspondence:
    """The weighted sum over the three kinds of pairs, each a plain mean over all pairs of places.

    Args:
        features, codes: of this rank's pictures, [B,C,h,w] and [B,D,h,w].
        near: the same of a near picture each; None where the weight of `knn` is 0.
        pool: features [P,C,h,w] and codes [P,D,h,w] that the random negatives are taken from: the global batch.
        points: [B,S,S,2] twice: of the picture itself, and of its near picture and of all its negatives.
        negatives: int64 [R,B], rows of the pool.
        terms: `self`, `knn`, `random`.
        rules: of `correspondence`.

    Gradient reaches all codes, also those of the near pictures and of the pool; features are constants.
    """
    features, codes = sample(features, points[0]), sample(codes, points[0])

    def pair(others: tuple[Tensor, Tensor], kind: str) -> tuple[Tensor, Tensor]:
        loss, similarity = correspondence((features, others[0]), (codes, others[1]), terms[kind].shift, **rules)
        return loss.mean(), similarity.detach().mean()

    found = {}
    if terms["self"].weight:
        found["self"] = [pair((features, codes), "self")]
    if terms["knn"].weight:
        found["knn"] = [pair(tuple(sample(maps, points[1]) for maps in near), "knn")]
    if terms["random"].weight:
        found["random"] = [
            pair(tuple(sample(maps[chosen], points[1]) for maps in pool), "random") for chosen in negatives
        ]
    losses = {kind: torch.stack([loss for loss, _ in pairs]).mean() for kind, pairs in found.items()}
    similarities = {kind: torch.stack([mean for _, mean in pairs]).mean() for kind, pairs in found.items()}
    total = sum((terms[kind].weight * loss for kind, loss in losses.items()), start=codes.sum() * 0)
    return Correspondence(total, losses, similarities)


def reconstruction(decoded: Tensor, features: Tensor) -> Tensor:
    """-mean cosine of decoded codes and features, both [B,C,h,w]; the features are constants."""
    return -F.cosine_similarity(real(decoded), real(features.detach()), dim=1, eps=EPS).mean()


def alignment(codes: Tensor, augmented: Tensor, view: Any) -> Tensor:
    """-mean cosine of the codes of a view [B,D,i,j] and the picture's codes [B,D,h,w] at the same places.

    view: `<name>.params` of the view: boxes [B,4] (top, left, height, width in pixels of the picture), flip [B] bool,
    source (height and width of the picture). Gradient reaches both.
    """
    top, left, height, width = (
        value[:, None] / side for value, side in zip(view.boxes.T, view.source * 2, strict=True)
    )
    down, right = ((torch.arange(side, device=codes.device) + 0.5) / side for side in augmented.shape[-2:])
    right = torch.where(view.flip[:, None], 1 - right, right)
    y, x = 2 * (top + down * height) - 1, 2 * (left + right * width) - 1
    places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    here = F.grid_sample(real(codes), places.to(real_dtype(codes)), padding_mode="border", align_corners=False)
    return -F.cosine_similarity(here, real(augmented), dim=1, eps=EPS).mean()
