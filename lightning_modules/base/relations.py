"""What a method says about single patches: which patches of some pictures it holds together with one of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.backbone import Features

Place = tuple[float, float]
"""A point of a picture as the network sees it, padding included: parts of its height and width, 0 to below 1."""


@dataclass(frozen=True)
class Seen:
    """One picture as the network saw it."""

    name: str
    image: Tensor
    """[3,H,W] in 0..1; padded on the right and below."""
    size: tuple[int, int]
    """Rows and columns that the picture itself fills, px."""
    features: Features
    """Of a batch of this picture alone."""
    codes: Tensor
    """[1,D,h,w]"""

    def inside(self, grid: tuple[int, int]) -> Tensor:
        """Patches of a map that see any of the picture, bool [h,w]."""
        valid = torch.zeros(1, *self.image.shape[-2:], device=self.codes.device)
        valid[:, : self.size[0], : self.size[1]] = 1
        return F.adaptive_avg_pool2d(valid, grid)[0] > 0


@dataclass(frozen=True)
class Relation:
    """The patches that belong to one, and by which rule."""

    name: str
    """Of its figure's file."""
    title: str
    rule: str
    """In plain sentences, for the page."""
    maps: Sequence[Tensor] = ()
    """bool [h,w] of every picture: patches that belong. Or one map alone, float [h,w]: weights of the patches of the
    first picture, NaN where a patch has none. Empty: nothing can be said here, and `rule` says why."""


def cell(place: Place, grid: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the patch of a map [h,w] that a place lies in."""
    return tuple(min(int(part * count), count - 1) for part, count in zip(place, grid, strict=True))


def stacked(pictures: Sequence[Seen]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Features of pictures of different sizes as one batch: [B,C,h,w] with zeros beyond each, bool [B,h,w] of the
    patches that see any of their picture, and h, w of each."""
    maps = [seen.features.concat()[0] for seen in pictures]
    grids = [tuple(own.shape[-2:]) for own in maps]
    inside = [seen.inside(grid) for seen, grid in zip(pictures, grids, strict=True)]
    height, width = (max(sides) for sides in zip(*grids, strict=True))

    def batch(parts: list[Tensor]) -> Tensor:
        return torch.stack([F.pad(own, (0, width - own.shape[-1], 0, height - own.shape[-2])) for own in parts])

    return batch(maps), batch(inside), grids
