"""Feature correspondence of STEGO (ICLR 2022): similarities of codes copy those of frozen features, sharpened.

Between a picture and itself, a near picture, and random pictures: the cosines of all pairs of sampled patches say how
much two codes should agree. Sections 3.1 and 3.2 of the paper.
Shapes: S sample points a side, so S*S points of a picture; R random pictures an anchor; all else as in common/spec.py.
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


def salient_points(points: Tensor, salient: Tensor, draws: Tensor, share: float) -> Tensor:
    """Sample points of which a share lies on salient pixels, as released with `use_salience`.

    Args:
        points: uniform ones [B,S,S,2], which the rest stay, and all of a picture without a salient pixel.
        salient: bool [B,H,W].
        draws: uniform in [0,1), [B,S,S,2]: which salient pixel, and whether.
        share: of the points, 0..1 (0.9 as released).

    Returns points [B,S,S,2] in [-1,1]; -1 and 1 are the centres of the border pixels.
    """
    height, width = salient.shape[1:]
    ranks = salient.flatten(1).cumsum(1)
    count = ranks[:, -1:]
    wanted = (draws[..., 0].flatten(1) * count).long() + 1  # the how many-th salient pixel, from 1
    place = torch.searchsorted(ranks, wanted).clamp(max=height * width - 1).view(points.shape[:3])
    x, y = place % width, place.div(width, rounding_mode="floor")
    chosen = torch.stack([x / max(width - 1, 1), y / max(height - 1, 1)], dim=-1) * 2 - 1
    taken = (draws[..., 1] < share) & (count > 0)[:, :, None]
    return torch.where(taken[..., None], chosen.to(points), points)


def label_signal(label: Tensor, classes: int) -> Tensor:
    """The oracle's signal, which **reads labels**: one-hot float32 [B,C+1,H,W] of label int64 [B,H,W].

    Pixels without a label (ids outside 0..C-1) are a class of their own, as released with `use_true_labels`.
    """
    known = (label >= 0) & (label < classes)
    return F.one_hot(torch.where(known, label, classes), classes + 1).movedim(-1, 1).float()


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


def random_negatives(
    seed: int,
    step: int,
    repeats: int,
    count: int,
    kind: str = "shifted",
    part: int = 0,
    purpose: str = "stego.negatives",
) -> Tensor:
    """Which of `count` pictures is the negative of which: int64 [R,count], drawn by (seed, purpose, step, repetition,
    part).

    kind: `shifted` as released, or `cycle`. A single picture is its own negative.

    Raises:
        ConfigError: another kind.
    """
    one_of("method.negatives.draw", kind, NEGATIVES)
    orders = [
        torch.randperm(count, generator=chance.generator(seed, purpose, step, r, *([part] if part else [])))
        for r in range(repeats)
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
    return _copied(signal(*features, pointwise, average), codes, shift, zero_clamp, stabilize)


@torch.no_grad()
def signal(one: Tensor, two: Tensor, pointwise: bool = True, average: Callable[[Tensor], Tensor] = same) -> Tensor:
    """What codes copy, before the shift: the (centred) cosines of features, [B,h,w,i,j]; see `correspondence`."""
    wanted = cosines(one, two)
    if not pointwise:
        return wanted
    # What is left after the centring has mean zero, so that the batch's mean is all there is to put back.
    return wanted - wanted.mean(dim=(3, 4), keepdim=True) + average(wanted.mean())


def limits(zero_clamp: bool, stabilize: bool) -> tuple[float, float | None]:
    """Between which values code cosines count; see `correspondence`."""
    return 0.0 if zero_clamp else -1e4, CEILING if stabilize else None


def _copied(
    wanted: Tensor, codes: tuple[Tensor, Tensor], shift: float | Tensor, zero_clamp: bool, stabilize: bool
) -> tuple[Tensor, Tensor]:
    found = cosines(*codes)
    limited = found.clamp(*limits(zero_clamp, stabilize))
    return -limited * (wanted - shift), found


def quantile(signals: list[Tensor], share: float) -> Tensor:
    """The value that a share of a picture's pairs lie below, mean over pictures: scalar, of signals [B,h,w,i,j].

    With centred signals all pictures have one mean, so that the mean of their quantiles is close to that of all pairs;
    and it can be averaged over ranks.
    """
    rows = torch.stack([values.flatten(1) for values in signals])
    rank = min(rows.shape[-1], max(1, round(share * rows.shape[-1])))
    return rows.kthvalue(rank).values.mean()


@dataclass(frozen=True)
class Term:
    """Weight and shift of one kind of pair; a weight of 0 leaves it out. shift None: given by `shift_of`."""

    weight: float
    shift: float | None


@dataclass(frozen=True)
class Correspondence:
    """The loss and what it is made of, by kind (self, knn, random): `losses`, `similarities` (mean code cosine) and the
    `shifts` that held."""

    total: Tensor
    losses: dict[str, Tensor]
    similarities: dict[str, Tensor]
    shifts: dict[str, Tensor | float]


def correspondence_loss(
    features: Tensor,
    codes: Tensor,
    near: tuple[Tensor, Tensor] | None,
    pool: tuple[Tensor, Tensor],
    points: tuple[Tensor, Tensor],
    negatives: Tensor,
    terms: dict[str, Term],
    *,
    pointwise: bool = True,
    zero_clamp: bool = True,
    stabilize: bool = False,
    average: Callable[[Tensor], Tensor] = same,
    shift_of: Callable[[str, list[Tensor]], Tensor] | None = None,
) -> Correspondence:
    """The weighted sum over the three kinds of pairs, each a plain mean over all pairs of places.

    Args:
        features, codes: of this rank's pictures, [B,C,h,w] and [B,D,h,w].
        near: the same of a near picture each; None where the weight of `knn` is 0.
        pool: features [P,C,h,w] and codes [P,D,h,w] that the random negatives are taken from: the global batch.
        points: [B,S,S,2] twice: of the picture itself, and of its near picture and of all its negatives.
        negatives: int64 [R,B], rows of the pool.
        terms: `self`, `knn`, `random`.
        pointwise, zero_clamp, stabilize, average: of `correspondence`.
        shift_of: gives the shift of a kind whose term has none, from its signals [B,h,w,i,j], one for each repetition.

    Gradient reaches all codes, also those of the near pictures and of the pool; features are constants.
    """
    features, codes = sample(features, points[0]), sample(codes, points[0])

    others: dict[str, list[tuple[Tensor, Tensor]]] = {}
    if terms["self"].weight:
        others["self"] = [(features, codes)]
    if terms["knn"].weight:
        others["knn"] = [tuple(sample(maps, points[1]) for maps in near)]
    if terms["random"].weight:
        others["random"] = [tuple(sample(maps[chosen], points[1]) for maps in pool) for chosen in negatives]
    losses, similarities, shifts = {}, {}, {}
    for kind, pairs in others.items():
        signals = [signal(features, theirs, pointwise, average) for theirs, _ in pairs]
        given = terms[kind].shift
        shifts[kind] = shift_of(kind, signals) if given is None else given
        found = [
            _copied(wanted, (codes, theirs), shifts[kind], zero_clamp, stabilize)
            for wanted, (_, theirs) in zip(signals, pairs, strict=True)
        ]
        losses[kind] = torch.stack([loss.mean() for loss, _ in found]).mean()
        similarities[kind] = torch.stack([cosine.detach().mean() for _, cosine in found]).mean()
    total = sum((terms[kind].weight * loss for kind, loss in losses.items()), start=codes.sum() * 0)
    return Correspondence(total, losses, similarities, shifts)


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
