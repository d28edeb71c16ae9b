"""Objects of one picture pasted into another one of the batch. Source: CutLER (CVPR 2023).

Pictures [B,3,H,W] with maps of their objects int64 [B,H,W]: 0 nothing, 255 not known, other values one object each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common import chance
from common.spec import IGNORE

COVERED = 0.5
"""Share of an object that is there, from which what would cover it is not pasted."""


@dataclass(frozen=True)
class Paste:
    """What is drawn for one picture."""

    order: np.ndarray
    """Of the partner's objects, in a drawn order."""
    count: int
    """The first so many are copied: the only one, or from one to all but one."""
    ratio: float
    """Size of the partner on the picture, of the picture's sides."""
    place: tuple[float, float]
    """Shares of the free height and width above and left of it."""


def drawn(key: tuple[int, ...], objects: int, ratios: Sequence[float]) -> Paste:
    """The draw of (seed, step, picture) with a partner that has `objects`, at least one."""
    draw = chance.numpy_generator(key[0], "copy_paste", *key[1:])
    ratio, top, left, share = draw.uniform(*ratios), draw.random(), draw.random(), draw.random()
    count = 1 if objects == 1 else 1 + int(share * (objects - 1))
    return Paste(draw.permutation(objects), min(count, max(1, objects - 1)), float(ratio), (top, left))


def copy_paste(
    images: Tensor, ids: Tensor, keys: Sequence[tuple[int, ...]], ratios: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Every picture with objects of its partner, the other one of the pair (0,1), (2,3), …; the last of an odd number
    stays. Of a batch of two a device, as released, each picture's partner is the one that it is there.

    Objects that are covered lose the covered pixels; an object that would cover `COVERED` or more of one that is there
    is left out. keys: (seed, step, picture) of each picture. ratios: least and most of the partner's size, null: as is.
    """
    if ratios is None:
        return images, ids
    pasted = [
        pasted_on(images[row], ids[row], images[row ^ 1], ids[row ^ 1], keys[row], ratios)
        if row ^ 1 < len(images)
        else (images[row], ids[row])
        for row in range(len(images))
    ]
    return tuple(torch.stack(parts) for parts in zip(*pasted, strict=True))


def pasted_on(
    image: Tensor, ids: Tensor, other: Tensor, other_ids: Tensor, key: tuple[int, ...], ratios: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """One picture [3,H,W] with map [H,W] and objects of another of this size."""
    names = other_ids.unique()
    names = names[(names > 0) & (names < IGNORE)].tolist()
    if not names:
        return image, ids
    paste = drawn(key, len(names), ratios)
    height, width = (max(1, int(side * paste.ratio)) for side in ids.shape)
    top, left = (
        int(share * (side - own + 1)) for share, side, own in zip(paste.place, ids.shape, (height, width), strict=True)
    )
    window = slice(top, top + height), slice(left, left + width)
    picture = F.interpolate(other[None], (height, width), mode="bilinear", antialias=True)[0]
    shape = F.interpolate(other_ids[None, None].float(), (height, width), mode="nearest-exact")[0, 0].long()
    sizes = ids.flatten().bincount(minlength=IGNORE + 1).clamp(min=1)
    image, found = image.clone(), ids.clone()
    free = next_free(ids)
    for name in (names[place] for place in paste.order[: paste.count]):
        inside = shape == name
        hidden = ids[window][inside].bincount(minlength=IGNORE + 1) / sizes
        if free >= IGNORE or not bool(inside.any()) or bool((hidden[1:IGNORE] >= COVERED).any()):
            continue
        found[window][inside] = free
        image[(slice(None), *window)] = torch.where(inside, picture, image[(slice(None), *window)])
        free += 1
    return image, found


def next_free(ids: Tensor) -> int:
    """An id above all of a map's."""
    return int(torch.where(ids == IGNORE, 0, ids).max()) + 1
