"""Large pictures: seen through overlapping windows, whose score maps are blended at patch resolution.

A window sees only itself, so what the network says near its edge lacks context. Windows overlap, and each counts fully
in its middle, hardly at its edge. All windows start at whole patches of one grid, so that shifting them changes the
context of a patch and never its place. What is held is the picture in 8 bit and K maps of patches.

A transformer's answer also depends on where in the window a patch lies, and not smoothly: a position embedding that was
trained on another grid may hold patterns of two or three patches. Windows at an even step see a patch at even places
only, or at odd ones only, whatever their number. So windows lie on an inclined lattice, as the samples of a rotated
grid in antialiasing: the windows over a patch have it at as many different rows and columns as there are windows.

Along the picture's border a patch can only be seen by windows that lie there too, so the lattice offers it few, and
on a scene most of what a shift changed was found there. So windows of its own touch the border: as many over a place
as see a patch inside, or one at every patch, where that is fewer.
"""

import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from evaluation import sliding

log = logging.getLogger(__name__)

BATCH = 8
"""Windows that the network sees at once."""
OVERLAP = {True: 0.85, False: 0.75}
"""Of transformers and of others, without a wish. What a transformer says of a patch varies more from window to window,
so it takes more of them."""
POWER = {True: 1, False: 2}
"""Of half a sine wave, by which a window of a transformer counts, and of another network. Padding spoils the edges of a
convolutional network's windows most; a transformer's differ everywhere, and a broader weight averages more of them."""
SLOPE = (math.sqrt(5) - 1) / 2
"""Of the lattice, the golden ratio: its points, projected onto either axis, lie as evenly as can be."""


def inclined(window: int, overlap: float) -> tuple[int, int]:
    """(a, b) of the lattice with the basis (a, b), (-b, a), in patches, for windows of `window` x `window` patches.

    A lattice point stands for a^2 + b^2 patches, near (window (1 - overlap))^2. a and b have no common divisor and one
    of them is even, so that rows and columns of all residues occur; a + b <= window, so that windows leave no gap.
    """
    wanted = math.log(max(window * (1 - overlap), 1.0) ** 2)
    found = [
        (abs(math.log(a * a + b * b) - wanted) + 2 * abs(math.atan2(b, a) - math.atan(SLOPE)), a, b)
        for a in range(1, window + 1)
        for b in range(min(a, window - a + 1))
        if math.gcd(a, b) == 1 and (a + b) % 2 and (b or a == 1)
    ]
    return min(found)[1:]


def places(
    size: tuple[int, int], sides: tuple[int, int], overlap: float, offset: tuple[int, int] = (0, 0)
) -> dict[tuple[int, int], float]:
    """Upper left corners of windows of `sides` that cover a picture of `size`, all in patches -> how much they count.

    Inside, a patch is seen by about 1 / (1 - overlap)^2 windows of weight 1, whose lattice is shifted by `offset`. So
    many, or one for each patch of a side, see a patch at the border too; these windows count less, as they lie closer.
    Where a window spans the picture along one axis, sides may differ.
    """
    last = [whole - side for whole, side in zip(size, sides, strict=True)]
    steps = [min(side, int(side * (1 - overlap) ** 2 / 2) * 2 + 1) for side in sides]  # odd
    rows, columns = (_slide(end, step, shift) for end, step, shift in zip(last, steps, offset, strict=True))
    if not all(last):  # it spans the picture along an axis, and all passes come from sliding along the other
        return {(top, left): 1.0 for top in rows for left in columns}
    a, b = inclined(min(sides), overlap)
    period = a * a + b * b
    turn = b * pow(a, -1, period)  # the lattice has the points (y, x) with x = turn * y modulo a^2 + b^2
    found = {}
    for top in range(1, last[0]):
        first = 1 + (offset[1] + turn * (top - offset[0]) - 1) % period
        found |= {(top, left): 1.0 for left in range(first, last[1], period)}
    spacing = math.sqrt(period)
    found |= {(top, left): steps[1] / spacing for top in (0, last[0]) for left in columns}
    found |= {(top, left): steps[0] / spacing for top in rows for left in (0, last[1])}
    return found


def _slide(last: int, step: int, offset: int) -> list[int]:
    """0..last every `step`, shifted by `offset`, with both ends."""
    return sorted({0, last, *range(offset % step, last, step)})


def bell(count: int, power: int) -> Tensor:
    """Weights [count] of the patches along one side of a window: a power of half a sine wave, nowhere zero."""
    return torch.sin(math.pi * (torch.arange(count) + 0.5) / count) ** power


@torch.inference_mode()
def blended(
    picture: np.ndarray,
    scores_of: Callable[[Tensor], Tensor],
    window: int,
    unit: int,
    overlap: float | None = None,
    offset: tuple[int, int] = (0, 0),
    transformer: bool = False,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, tuple[int, int]]:
    """Scores of a picture uint8 [H,W,3] by windows: ([1,K,h,w] on the CPU, (H', W') of the padded picture they cover).

    Args:
        scores_of: pictures float [B,3,h,w] in 0..1 -> scores [B,K,h/s,w/s], linear in the codes.
        window: side of a window, px; rounded up to a multiple of `unit`, and no larger than the picture needs.
        unit: windows begin at multiples of it: the patch, or the coarsest stride.
        overlap: share of a side that neighbours have in common, 0 to below 1: about 1 / (1 - overlap)^2 windows see a
            patch, and at least two (a lattice without gaps is not sparser). None: see OVERLAP.
        offset: rows and columns by which the lattice of windows is shifted, px; rounded down to multiples of `unit`.
        transformer: whether the network is one.
    """
    overlap = OVERLAP[transformer] if overlap is None else overlap
    height, width = (-(-side // unit) * unit for side in picture.shape[:2])
    sides = [min(-(-window // unit) * unit, side) for side in (height, width)]
    patches = [(height // unit, width // unit), tuple(side // unit for side in sides), tuple(o // unit for o in offset)]
    grid = sorted(places(*patches[:2], overlap, patches[2]).items())
    total = weights = None
    for first in range(0, len(grid), BATCH):
        part = grid[first : first + BATCH]
        seen = torch.stack([_cut(picture, (top * unit, left * unit), sides) for (top, left), _ in part])
        found = sliding.whole_cells(scores_of(seen.to(device)).float(), tuple(sides), unit).cpu()
        stride = sides[0] // found.shape[2]
        if total is None:
            total = torch.zeros(found.shape[1], height // stride, width // stride)
            weights = torch.zeros(height // stride, width // stride)
            rows, columns = (bell(count, POWER[transformer]) for count in found.shape[2:])
            taper, cells = rows[:, None] * columns, unit // stride
        for ((top, left), share), maps in zip(part, found, strict=True):
            rows = slice(top * cells, top * cells + maps.shape[1])
            columns = slice(left * cells, left * cells + maps.shape[2])
            weight = share * taper
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
