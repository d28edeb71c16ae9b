"""Large pictures: seen through overlapping windows, whose score maps are blended at patch resolution.

A window sees only itself, so what the network says near its edge lacks context. Windows overlap, and each counts by a
raised cosine: fully in its middle, hardly at its edge. All windows start at whole patches of one grid, so that shifting
them changes the context of a patch and never its place. What is held is the picture in 8 bit and K maps of patches.
"""

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger(__name__)

BATCH = 8
"""Windows that the network sees at once."""
FLOOR = 1e-3
"""Weight of a window at its very edge: what no other window sees must count too."""


def starts(length: int, window: int, step: int, offset: int = 0) -> list[int]:
    """Where windows begin along an axis: every `step` px, the whole grid shifted by `offset`, kept inside 0..length.

    All of the axis is covered. The first and the last window touch its ends.
    """
    last = length - window
    if last <= 0:
        return [0]
    shift = offset % step
    inner = range(shift - step if shift else 0, last + step, step)
    return sorted({min(max(place, 0), last) for place in inner})


def bell(count: int) -> Tensor:
    """Weights [count] of the patches along one side of a window: a raised cosine, at least FLOOR."""
    place = (torch.arange(count) + 0.5) / count
    return (0.5 - 0.5 * torch.cos(2 * math.pi * place)).clamp(min=FLOOR)


@torch.inference_mode()
def blended(
    picture: np.ndarray,
    scores_of: Callable[[Tensor], Tensor],
    window: int,
    unit: int,
    overlap: float = 0.5,
    offset: tuple[int, int] = (0, 0),
    device: torch.device | str = "cpu",
) -> tuple[Tensor, tuple[int, int]]:
    """Scores of a picture uint8 [H,W,3] by windows: ([1,K,h,w] on the CPU, (H', W') of the padded picture they cover).

    Args:
        scores_of: pictures float [B,3,h,w] in 0..1 -> scores [B,K,h/s,w/s], linear in the codes.
        window: side of a window, px; rounded up to a multiple of `unit`, and no larger than the picture needs.
        unit: windows begin at multiples of it: the patch, or the coarsest stride.
        overlap: share of a window that the next one sees again, 0 to below 1.
        offset: rows and columns by which the grid of windows is shifted, px; rounded down to multiples of `unit`.
    """
    height, width = (-(-side // unit) * unit for side in picture.shape[:2])
    sides = [min(-(-window // unit) * unit, side) for side in (height, width)]
    steps = [max(unit, round(side * (1 - overlap) / unit) * unit) for side in sides]
    shifts = [part // unit * unit for part in offset]
    grid = [
        (top, left)
        for top in starts(height, sides[0], steps[0], shifts[0])
        for left in starts(width, sides[1], steps[1], shifts[1])
    ]
    total = weights = None
    for first in range(0, len(grid), BATCH):
        part = grid[first : first + BATCH]
        seen = torch.stack([_cut(picture, place, sides) for place in part])
        found = scores_of(seen.to(device)).float().cpu()
        stride = sides[0] // found.shape[2]
        if total is None:
            total = torch.zeros(found.shape[1], height // stride, width // stride)
            weights = torch.zeros(height // stride, width // stride)
            weight = bell(found.shape[2])[:, None] * bell(found.shape[3])
        for (top, left), maps in zip(part, found, strict=True):
            rows = slice(top // stride, top // stride + maps.shape[1])
            columns = slice(left // stride, left // stride + maps.shape[2])
            total[:, rows, columns] += maps * weight
            weights[rows, columns] += weight
        if len(grid) > 500 and first // BATCH % max(1, len(grid) // BATCH // 10) == 0:
            log.info("%d of %d windows", first, len(grid))
    return total.div_(weights)[None], (height, width)


def _cut(picture: np.ndarray, place: tuple[int, int], sides: list[int]) -> Tensor:
    """A window float [3,h,w] in 0..1; beyond the right and lower border the last row and column are repeated."""
    (top, left), (height, width) = place, sides
    part = picture[top : top + height, left : left + width]
    lacking = height - part.shape[0], width - part.shape[1]
    if any(lacking):
        part = np.pad(part, ((0, lacking[0]), (0, lacking[1]), (0, 0)), mode="edge")
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).float().div_(255)


def bands(ids: Iterator[tuple[int, Tensor]], size: tuple[int, int], clusters: int) -> np.ndarray:
    """Bands of ids (first row, [n,W']) -> one map uint8 or uint16 [H,W], cut to its size."""
    found = np.zeros(size, dtype=np.uint8 if clusters <= 256 else np.uint16)
    for first, band in ids:
        rows = min(len(band), size[0] - first)
        if rows > 0:
            found[first : first + rows] = band[:rows, : size[1]].cpu().numpy()
    return found
