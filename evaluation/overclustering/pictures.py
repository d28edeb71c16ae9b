"""What the read-outs keep of each picture that is evaluated: its codes, reduced, and where its labels are looked at.

Per patch 4 bytes for each of the reduced numbers (200 for 50), per place that is scored 1 byte for the label and 1 for
the noisy foreground; nothing else grows with the number of pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from common import chance
from retrieval.whitening import Reduction


@dataclass(frozen=True)
class Picture:
    """One picture, on the CPU; h x w patches, H x W places that are scored."""

    index: int
    points: Tensor
    """float32 [h*w,d]: reduced codes, in raster order."""
    size: tuple[int, int]
    """h and w."""
    rows: Tensor
    """int64 [H]: the row of patches of each row of places."""
    columns: Tensor
    """int64 [W]"""
    label: Tensor | None = None
    """uint8 [H,W], 255 = ignore; None without labels, or where nothing may read them."""
    mask: Tensor | None = None
    """bool [H,W]: the noisy foreground."""

    def at_places(self, ids: Tensor) -> Tensor:
        """Values of patches [h*w] at the places: [H,W]."""
        return ids.view(self.size)[self.rows[:, None], self.columns]


def places(valid: Tensor, size: int | None) -> tuple[Tensor, Tensor]:
    """Rows [H] and columns [W] of the pixels that are scored, of a picture without its padding (valid bool [H0,W0]).

    size: side of the square grid that labels are brought to by nearest neighbour, as torch has it: place i is pixel
    floor(i H0 / size); None: every pixel.
    """
    found = []
    for axis in (1, 0):
        count = int(valid.any(axis).sum())
        side = count if size is None else size
        found.append(torch.arange(side) * count // side)
    return found[0], found[1]


def taken(
    batch: Mapping[str, Any],
    codes: Tensor,
    reduction: Reduction,
    size: int | None,
    labelled: bool,
    masks: Mapping[int, Tensor] = MappingProxyType({}),
) -> list[Picture]:
    """What is kept of a batch (`image`, `valid`, `index`, `label`) with codes [B,D,h,w].

    labelled: whether labels may be read. masks: noisy foregrounds bool [H,W] by index, as `masked` gives them.
    """
    found, (height, width) = [], batch["image"].shape[-2:]
    points = reduction(codes.detach().flatten(2).mT).cpu().unflatten(1, tuple(codes.shape[-2:]))
    for number, index in enumerate(batch["index"].tolist()):
        down, across = places(batch["valid"][number].cpu(), size)
        rows, columns = down * points.shape[1] // height, across * points.shape[2] // width
        inside = int(rows.max()) + 1, int(columns.max()) + 1
        own = points[number, : inside[0], : inside[1]]
        label = None
        if labelled and "label" in batch:
            label = batch["label"][number].cpu()[down[:, None], across].to(torch.uint8)
        points_of = own.flatten(0, 1).clone()  # not a view of the batch
        found.append(Picture(index, points_of, inside, rows, columns, label, masks.get(index)))
    return found


def masked(batch: Mapping[str, Any], masks: Tensor, size: int | None) -> dict[int, Tensor]:
    """Masks bool [B,h,w] of a batch at the places that are scored, by index: bool [H,W], on the CPU."""
    found, (height, width) = {}, batch["image"].shape[-2:]
    for mask, valid, index in zip(masks.cpu(), batch["valid"].cpu(), batch["index"].tolist(), strict=True):
        down, across = places(valid, size)
        found[index] = mask[(down * mask.shape[0] // height)[:, None], across * mask.shape[1] // width]
    return found


def some(count: int, pictures: int, points: int | None, seed: int, index: int) -> Tensor | None:
    """Which of the `count` patches of picture `index` are among the `points` that `pictures` pictures give; None: all.

    Each gives the same number, at least one; keyed by seed and index.
    """
    share = count if points is None else max(1, points // max(1, pictures))
    if share >= count:
        return None
    return torch.randperm(count, generator=chance.generator(seed, "overcluster.points", index))[:share]


def sample(pictures: Sequence[Picture], points: int | None, seed: int) -> Tensor:
    """Points of all pictures [n,d], about `points` of them (None: all), the same for the same pictures."""
    rows = []
    for picture in pictures:
        chosen = some(len(picture.points), len(pictures), points, seed, picture.index)
        rows.append(picture.points if chosen is None else picture.points[chosen])
    return torch.cat(rows)
