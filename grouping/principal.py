"""Masks of a picture by the principal directions of its own features (PriMaPs, Hahn et al., TMLR 2024).

The first principal direction of what is left of a picture names a seed; the patches whose features are near enough to
the seed's are a mask and leave; and so on until little is left. Nothing is learnt, and no gradient flows. Directions
come from covariances and a symmetric solver: exact, and several times faster than subspace iterations over the samples.

A direction has no sign, and +v and -v give other seeds. `mean` turns it towards the mean of what is left, so that the
masks depend on nothing but the features; `library` leaves the solver's, as released, where a patch that has left may
become a seed again.
Shapes: B pictures, C channels, h x w patches, N = h*w, T masks, n samples.
"""

import contextlib
import copy
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from common import distributed
from common.precision import exact, real

SIGNS = ("mean", "library")
LEFT_OUT = 0.95
"""Rounds end when this share of a picture is in masks."""
MOST = 254
"""Masks of a picture at most: ids 1..254, 0 being no mask and 255 no label."""
SMALL = 64
"""Channels up to which a dense solver finds the vector on a CPU."""
GAIN = 10.0
"""Filtered masks are multiplied by it and clamped to 0..1: binary for thresholds of 0.1 and more."""


@dataclass(frozen=True)
class MaskStack:
    """The masks of one picture in the order in which they were found."""

    masks: Tensor
    """float32 [T,h,w]: cosine to the seed, divided by the largest; 0 outside the mask."""
    seeds: Tensor
    """int64 [T], row-major places."""
    left: Tensor
    """bool [T,h,w]: what is in no mask after each round."""


@torch.no_grad()
def principal_masks(maps: Tensor, threshold: float, sign: str | Tensor = "mean") -> list[MaskStack]:
    """The masks of pictures by their features [B,C,h,w], which are not normalised. Pictures do not meet.

    A round: v = first principal direction of the centred features that are left; the seed is the place of the largest
    v . f/|f| among them (with `library` among all, those that have left counting as 0); the mask is where the cosine to
    the seed's feature is at least `threshold` times the largest. Rounds end at LEFT_OUT, where three rounds in turn
    leave the same, and after MOST masks.

    sign: one of SIGNS, or directions [B,T,C] that those found here shall point along (the seed rule is `library`'s
    then). Computed in float32 (float64 for float64 maps), also inside autocast.
    """
    size = tuple(maps.shape[-2:])
    if maps.device.type == "cpu" and len(maps) > 1:
        given = sign.split(1) if isinstance(sign, Tensor) else [sign] * len(maps)
        pairs = zip(maps.split(1), given, strict=True)
        return [stack for part, own in pairs for stack in principal_masks(part, threshold, own)]
    with exact(maps.device):
        rows = real(maps).flatten(2)
        picture = Pictures(rows, F.normalize(rows, dim=1), Scatters(rows))
        count, _, cells = rows.shape
        free = torch.ones(count, cells, dtype=torch.bool, device=maps.device)
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in range(count)]
        active = list(range(count))
        for number in range(MOST):
            if not active:
                break
            given = sign[active, number] if isinstance(sign, Tensor) else sign
            masks, seeds = _round(picture.of(active), free[active], threshold, given)
            free[active] &= masks <= 0
            for row, mask, seed in zip(active, masks, seeds, strict=True):
                found[row].append((mask.unflatten(0, size), seed, free[row].clone().unflatten(0, size)))
            spent = (~free).float().mean(1).tolist()
            active = [row for row in active if spent[row] < LEFT_OUT and not _stuck(found[row])]
    return [MaskStack(*map(torch.stack, zip(*parts, strict=True))) for parts in found]


def _stuck(rounds: list[tuple[Tensor, Tensor, Tensor]]) -> bool:
    return len(rounds) > 2 and all(bool((left == rounds[-1][2]).all()) for _, _, left in rounds[-3:-1])


def _round(pictures: "Pictures", free: Tensor, threshold: float, sign: str | Tensor) -> tuple[Tensor, Tensor]:
    """Masks [b,N] and seeds [b] of one round; `sign` as a tensor: [b,C]."""
    rows, unit = pictures.rows, pictures.unit
    directions = pictures.scatters.directions(free)
    if isinstance(sign, Tensor):
        directions = _along(directions, sign.to(directions))
    elif sign == "mean":
        directions = _along(directions, (rows * free[:, None]).sum(2))
    scores = torch.einsum("bc,bcn->bn", directions, unit)
    outside = -torch.inf if isinstance(sign, str) and sign == "mean" else 0.0
    seeds = first_largest(scores.masked_fill(~free, outside))
    anchors = unit.gather(2, seeds[:, None, None].expand(-1, unit.shape[1], 1))[..., 0]
    near = torch.einsum("bc,bcn->bn", anchors, unit).masked_fill(~free, 0.0)
    largest = near.amax(1, keepdim=True)
    near = torch.where((near >= threshold * largest) & (near > 0), near, 0.0)
    return near / torch.where(largest > 0, largest, 1.0), seeds


def _along(directions: Tensor, others: Tensor) -> Tensor:
    """Directions [b,C], negated where their product with the other one is negative."""
    against = (directions * others).sum(1, keepdim=True) < 0
    return torch.where(against, -directions, directions)


def first_largest(scores: Tensor) -> Tensor:
    """The first place of the largest of scores [b,N], int64 [b], on every device."""
    places = torch.arange(scores.shape[1], device=scores.device)
    return torch.where(scores == scores.amax(1, keepdim=True), places, scores.shape[1]).amin(1)


class Scatters:
    """Products of the samples that are left of each picture with themselves, and their first principal directions.

    Samples are moved by their picture's mean first, so that little is lost when the mean of what is left is taken out.
    On a CPU, for one picture, the products are kept and those of the samples that have left are taken out, or they are
    made anew where fewer are left than have left: the smaller of two products in every round. A Lanczos solver then
    finds one vector. Other devices weigh the samples and solve all pictures at once.
    """

    def __init__(self, rows: Tensor):
        self.samples = (rows - rows.mean(2, keepdim=True)).mT.contiguous()
        self.products: Tensor | None = None
        self.left: Tensor | None = None

    def of(self, pictures: list[int]) -> "Scatters":
        """Of some of the pictures."""
        if len(pictures) == len(self.samples):
            return self
        found = copy.copy(self)
        found.samples = self.samples[pictures]
        return found

    def directions(self, left: Tensor) -> Tensor:
        """Of the samples bool [b,N] that are left, as unit rows [b,C]; `left` never grows from call to call."""
        if self.samples.device.type == "cpu":
            return self._direction(self.samples[0], left[0])[None]
        return self.directions_of_all(left)

    def directions_of_all(self, left: Tensor) -> Tensor:
        """The same of all pictures at once, by weights; nothing is kept."""
        weight = left[..., None].to(self.samples.dtype)
        mean = (self.samples * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        centred = (self.samples - mean) * weight
        return torch.linalg.eigh(centred.mT @ centred).eigenvectors[..., -1]

    def _direction(self, samples: Tensor, left: Tensor) -> Tensor:
        """Of samples [N,C] of one picture, on a CPU: [C]."""
        known = torch.ones_like(left) if self.left is None else self.left
        gone, count = known & ~left, int(left.sum())
        if self.products is None or int(gone.sum()) >= count:
            own = samples[left]
            self.products = own.T @ own
        else:
            own = samples[gone]
            self.products = self.products.addmm(own.T, own, alpha=-1)
        self.left = left.clone()
        total = left.to(samples.dtype) @ samples
        return torch.from_numpy(_leading((self.products - torch.outer(total, total) / count).numpy()))


def _leading(matrix: np.ndarray) -> np.ndarray:
    """The unit eigenvector [C] of the largest eigenvalue of a symmetric matrix; where it is 0, the last axis."""
    column = matrix[:, matrix.diagonal().argmax()]
    if len(matrix) > SMALL and column.any():
        with contextlib.suppress(ArpackError):
            return eigsh(matrix, k=1, which="LA", v0=column)[1][:, 0]
    last = len(matrix) - 1
    return scipy.linalg.eigh(matrix, subset_by_index=[last, last])[1][:, 0]


@dataclass(frozen=True)
class Pictures:
    """What rounds look at: features [b,C,N] as they are and at length 1, and their scatters."""

    rows: Tensor
    unit: Tensor
    scatters: Scatters

    def of(self, pictures: list[int]) -> "Pictures":
        """Some of them."""
        if len(pictures) == len(self.rows):
            return self
        return Pictures(self.rows[pictures], self.unit[pictures], self.scatters.of(pictures))


@dataclass(frozen=True)
class Moments:
    """Sums over samples of C channels: their number [], sum [C] and products [C,C], float64; they add up."""

    count: Tensor
    sum: Tensor
    products: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """Of samples [n,C]."""
        rows = rows.double()
        return cls(torch.tensor(float(len(rows)), dtype=torch.float64, device=rows.device), rows.sum(0), rows.T @ rows)

    @classmethod
    def none(cls, width: int, device: torch.device) -> "Moments":
        """Of no sample."""
        return cls(*(torch.zeros(size, dtype=torch.float64, device=device) for size in ((), (width,), (width, width))))

    def of_all_ranks(self) -> "Moments":
        """The sum over the ranks; a collective."""
        return Moments(*map(distributed.total, (self.count, self.sum, self.products)))

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.count + other.count, self.sum + other.sum, self.products + other.products)

    def directions(self, count: int) -> Tensor:
        """The first principal directions [count,C] of the centred samples, each towards their mean; float64."""
        mean = self.sum / self.count
        covariance = self.products / self.count - mean[:, None] * mean
        found = torch.linalg.eigh(covariance).eigenvectors[:, -count:].flip(1).T
        return _along(found, mean.expand_as(found))


@torch.no_grad()
def label_log_probs(masks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a picture's masks [T,h,w] say of its patches, for the CRF: (log-probabilities [T+1,h,w], background [h,w],
    filtered masks [T,h,w]).

    Masks are cleaned by a 3 x 3 median, borders mirrored, and sharpened by GAIN; the background is what they leave, up
    to the mean of their entries that are not 0 (1 everywhere where the median leaves none); softmax over background and
    masks. So even a certain mask has a probability of e / (e + T) alone, and the CRF has much to say.
    """
    filtered = (median_3x3(masks) * GAIN).clamp(0, 1)
    inside = filtered > 0
    level = filtered[inside].mean() if bool(inside.any()) else filtered.new_ones(())
    background = (level - filtered.sum(0)).clamp(0, 1)
    return torch.cat([background[None], filtered]).log_softmax(0), background, filtered


def median_3x3(maps: Tensor) -> Tensor:
    """The median of every place's neighbourhood, borders mirrored (repeated where a side is 1): [T,h,w]."""
    sides = maps.shape[-2:]
    padded = F.pad(maps[None], (1, 1, 1, 1), mode="reflect" if min(sides) > 1 else "replicate")[0]
    windows = padded.unfold(1, 3, 1).unfold(2, 3, 1).flatten(3)
    return windows.median(3).values
