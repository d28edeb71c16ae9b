"""Evaluation through overlapping windows, whose codes are averaged where they overlap.

Source: the evaluation of SegSort (Hwang et al., ICCV 2019; jyhjinghwang/SegSort), on whole cells.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError

KEYS = "evaluation.window"


def window_ends(length: int, side: int, stride: int) -> list[int]:
    """Where windows end along an axis of `length` px: the first at `side`, the last at `length`, evenly between, at
    most `stride` px apart."""
    if length <= side:
        return [length]
    count = -(-(length - side) // stride) + 1
    return np.linspace(side, length, count).astype(int).tolist()


def check(side: int | None, stride: int | None, unit: int, cached: bool) -> None:
    """Raises ConfigError for windows that a network with cells of `unit` px cannot be seen through."""
    if side is None:
        return
    if side < unit or side % unit:
        nearest = max(unit, round(side / unit) * unit)
        raise ConfigError(
            f"{KEYS}.size={side}: must be a multiple of {unit} px, the network's coarsest cell; set "
            f"{KEYS}.size={nearest}"
        )
    if stride is not None and not 0 < stride <= side:
        raise ConfigError(f"{KEYS}.stride={stride}: must be above 0, and at most {KEYS}.size={side}, or gaps are left")
    if cached:
        raise ConfigError(
            f"{KEYS}.size={side}: kept features are those of whole pictures; set backbone.cache_features=false"
        )


def averaged(
    images: Tensor, seen: Callable[[Tensor], dict[str, Tensor]], side: int, stride: int, unit: int
) -> dict[str, Tensor]:
    """Maps [B,C,h,w] by name of pictures [B,3,H,W]: means of those that `seen` gives for all windows over a cell.

    Windows start at multiples of `unit`, rounded down, of which H and W are multiples; a picture of at most `side` px
    along an axis is seen whole along it.
    """
    height, width = images.shape[-2:]
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    tops, lefts = (_starts(length, side, stride, unit) for length in (height, width))
    for top in tops:
        for left in lefts:
            found = seen(images[..., top : top + side, left : left + side])
            for name, maps in found.items():
                maps = whole_cells(maps, (min(side, height), min(side, width)), unit)
                cell = min(side, height) // maps.shape[-2]
                if name not in sums:
                    sums[name] = maps.new_zeros((*maps.shape[:2], height // cell, width // cell), dtype=torch.float32)
                    counts[name] = sums[name].new_zeros(sums[name].shape[-2:])
                rows = slice(top // cell, top // cell + maps.shape[-2])
                columns = slice(left // cell, left // cell + maps.shape[-1])
                sums[name][..., rows, columns] += maps
                counts[name][rows, columns] += 1
    return {name: total / counts[name] for name, total in sums.items()}


def whole_cells(maps: Tensor, sides: tuple[int, int], unit: int) -> Tensor:
    """Maps [B,C,h,w] of pictures of `sides` px (multiples of `unit`) with a whole number of px a cell, at most `unit`.

    They are as they are but for a network that gives some cells fewer than fit (`net10a`): these are stretched."""
    stride = min(unit, max(1, sides[0] // maps.shape[-2]))
    while any(side % stride for side in sides):
        stride -= 1
    grid = sides[0] // stride, sides[1] // stride
    return maps if tuple(maps.shape[-2:]) == grid else F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def _starts(length: int, side: int, stride: int, unit: int) -> list[int]:
    ends = window_ends(length, side, stride)
    return sorted({(end - min(side, length)) // unit * unit for end in ends})
