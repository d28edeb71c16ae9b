"""The canvas of the drawn scenes: soft-edged painting in units of the picture's shorter side, shapes, and noise.

Lengths are in units of 1/128 of the shorter side, so that a scene is the same scene at any size. Arrays see only
operations that IEEE 754 rounds exactly (+ - * / sqrt floor, comparisons; no sin, exp, power, float sums or matrix
products), and draws are uniform ones: a picture is the same to the bit on any machine and any number of threads.
"""

import functools
import math

import numpy as np

from common.chance import numpy_generator

UNITS = 128.0
"""Length of the shorter side in units."""

LATTICE = 512
"""Side of the table of random numbers behind all noise."""

Colour = tuple[float, float, float]
"""Red, green, blue in 0..1."""


class Dice:
    """Scalar draws from one keyed generator, as Python floats (numpy scalars would make float32 arrays float64)."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def chance(self, probability: float) -> bool:
        return float(self.rng.random()) < probability

    def sign(self) -> float:
        return 1.0 if float(self.rng.random()) < 0.5 else -1.0

    def count(self, low: int, high: int) -> int:
        """An integer in low..high, both ends included."""
        return low + int(float(self.rng.random()) * (high - low + 1))

    def pick(self, items, weights=None):
        """One of the items; equally likely without weights."""
        if weights is None:
            return items[int(float(self.rng.random()) * len(items))]
        rest = float(self.rng.random()) * math.fsum(weights)
        for item, weight in zip(items, weights, strict=True):
            rest -= weight
            if rest < 0:
                return item
        return items[-1]

    def colour(self, choices, spread: float = 0.1) -> Colour:
        """One of the 0..255 colours, brightness and each channel moved by up to `spread` of itself, as 0..1."""
        gain = 1.0 + self.uniform(-spread, spread)
        base = self.pick(choices)
        return tuple(min(1.0, c / 255.0 * gain * (1.0 + self.uniform(-spread, spread) * 0.6)) for c in base)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """The colour at share t of the way from a to b."""
    return tuple(p + (q - p) * t for p, q in zip(a, b, strict=True))


def dim(colour: Colour, factor: float) -> Colour:
    """The colour times a factor."""
    return tuple(c * factor for c in colour)


def planes(colour: Colour) -> np.ndarray:
    """The colour as [3,1,1]."""
    return np.array(colour, dtype=np.float32).reshape(3, 1, 1)


def tones(dark: Colour, light: Colour, t: np.ndarray) -> np.ndarray:
    """[H,W] shares -> [3,H,W] colours between dark (0) and light (1); shares outside 0..1 go beyond."""
    return planes(dark) + planes(tuple(q - p for p, q in zip(dark, light, strict=True))) * t


class Patch:
    """A window of the canvas with its own coordinates: `x` [1,w], `y` [h,1], `scale` pixels per length of them."""

    def __init__(
        self, rgb: np.ndarray, label: np.ndarray, instances: np.ndarray, x: np.ndarray, y: np.ndarray, scale: float
    ):
        self.rgb, self.label, self.instances, self.x, self.y, self.scale = rgb, label, instances, x, y, scale
        self.instance = 0

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """Signed distance (negative inside) -> share of the pixel that is covered, an edge one pixel wide."""
        share = 0.5 - distance * self.scale
        np.maximum(share, 0.0, out=share)
        return np.minimum(share, 1.0, out=share)

    def paint(self, alpha: np.ndarray, colour: np.ndarray | Colour, label: int | None = None) -> None:
        """Lay a colour ([3,h,w] or one colour) over the window; `label` goes where more than half is covered."""
        if isinstance(colour, tuple):
            colour = planes(colour)
        change = colour - self.rgb
        change *= alpha
        self.rgb += change
        if label is not None:
            inside = alpha > 0.5
            np.copyto(self.label, label, where=inside)
            np.copyto(self.instances, self.instance, where=inside)

    def shade(self, alpha: np.ndarray, factor: float) -> None:
        """Darken (or lighten) what is there by the factor, without changing its label."""
        self.rgb *= 1.0 + (factor - 1.0) * alpha


class Canvas:
    """A picture in the making: colours [3,H,W] float32 in 0..1, labels [H,W] uint8, and the things in it by the order
    in which they were drawn, from 1, int32 [H,W]; 0: none."""

    def __init__(self, height: int, width: int):
        self.scale = min(height, width) / UNITS
        self.height, self.width = height / self.scale, width / self.scale
        self.rgb = np.zeros((3, height, width), dtype=np.float32)
        self.label = np.zeros((height, width), dtype=np.uint8)
        self.instances = np.zeros((height, width), dtype=np.int32)
        self.drawn = 0
        self.x = (np.arange(width, dtype=np.float32) + 0.5) / self.scale
        self.y = (np.arange(height, dtype=np.float32) + 0.5) / self.scale

    def patch(self, left: float, top: float, right: float, bottom: float) -> Patch | None:
        """The window with these bounds in units; None where it lies outside or is narrower than two pixels."""
        rows, columns = self.label.shape
        x0, x1 = max(0, math.floor(left * self.scale)), min(columns, math.ceil(right * self.scale))
        y0, y1 = max(0, math.floor(top * self.scale)), min(rows, math.ceil(bottom * self.scale))
        if x1 - x0 < 2 or y1 - y0 < 2:
            return None
        window = slice(y0, y1), slice(x0, x1)
        planes = self.rgb[(slice(None), *window)], self.label[window], self.instances[window]
        return Patch(*planes, self.x[None, x0:x1], self.y[y0:y1, None], self.scale)

    def local(self, x: float, y: float, size: float, mirror: float, bounds: tuple[float, float, float, float]):
        """A window with its origin at (x, y) and length 1 = `size` units; x runs to the left for mirror -1.

        `bounds` are left, top, right, bottom in these coordinates; None where nothing of it is on the canvas.
        """
        left, right = sorted((x + mirror * bounds[0] * size, x + mirror * bounds[2] * size))
        patch = self.patch(left - 1, y + bounds[1] * size - 1, right + 1, y + bounds[3] * size + 1)
        if patch is not None:
            patch.x = (patch.x - x) * (mirror / size)
            patch.y = (patch.y - y) / size
            patch.scale = self.scale * size
        return patch

    def thing(self, x: float, y: float, size: float, mirror: float, bounds: tuple[float, float, float, float]):
        """As `local`, for one thing of its own: what is painted with a label belongs to it."""
        patch = self.local(x, y, size, mirror, bounds)
        if patch is not None:
            self.drawn += 1
            patch.instance = self.drawn
        return patch


def ellipse(p: Patch, cx: float, cy: float, a: float, b: float) -> np.ndarray:
    """Distance to an ellipse with half axes a (along x) and b, exact on its rim."""
    dx, dy = (p.x - cx) * (1.0 / a), (p.y - cy) * (1.0 / b)
    return (np.sqrt(dx * dx + dy * dy) - 1.0) * min(a, b)


def box(p: Patch, left: float, top: float, right: float, bottom: float, radius: float = 0.0) -> np.ndarray:
    """Distance to a rectangle with rounded corners."""
    dx = np.abs(p.x - (left + right) / 2) - ((right - left) / 2 - radius)
    dy = np.abs(p.y - (top + bottom) / 2) - ((bottom - top) / 2 - radius)
    if radius == 0.0:
        return np.maximum(dx, dy)
    ox, oy = np.maximum(dx, 0.0), np.maximum(dy, 0.0)
    return np.sqrt(ox * ox + oy * oy) + np.minimum(np.maximum(dx, dy), 0.0) - radius


def polygon(p: Patch, *points: tuple[float, float]) -> np.ndarray:
    """Distance to a convex polygon (corners clockwise as seen, y pointing down), as the largest edge distance."""
    distance = None
    for (x0, y0), (x1, y1) in zip(points, points[1:] + points[:1], strict=True):
        length = math.sqrt((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0))
        nx, ny = (y1 - y0) / length, -(x1 - x0) / length
        edge = (p.x - x0) * nx + (p.y - y0) * ny
        distance = edge if distance is None else np.maximum(distance, edge)
    return distance


def smooth(t: np.ndarray) -> np.ndarray:
    """The smooth step 3t^2 - 2t^3 on 0..1."""
    return t * t * (3.0 - 2.0 * t)


def wave(t: np.ndarray) -> np.ndarray:
    """A smooth wave of period 1 between 0 and 1 (the smooth step up and down again)."""
    return smooth(np.abs(2.0 * (t - np.floor(t)) - 1.0))


@functools.cache
def _lattice() -> np.ndarray:
    """The random numbers [512,512] that all noise reads, each call from another place; the same for every seed."""
    return numpy_generator(0, "scenes/lattice").random((LATTICE, LATTICE), dtype=np.float32)


def _cells(dice: Dice, t: np.ndarray, angular: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lattice positions of the cells of coordinates t, from a drawn offset, and the share of the way to the next."""
    cell = np.floor(t)
    share = t - cell
    return cell.astype(np.intp) + dice.count(0, LATTICE - 1), share if angular else smooth(share)


def noise1(dice: Dice, t: np.ndarray, angular: bool = False) -> np.ndarray:
    """Value noise in 0..1 along one axis, period 1 in t; `angular` joins its values by straight lines."""
    cell, share = _cells(dice, t, angular)
    values = _lattice()[dice.count(0, LATTICE - 1)]
    a = values[cell % LATTICE]
    return a + (values[(cell + 1) % LATTICE] - a) * share


def noise(dice: Dice, y: np.ndarray, x: np.ndarray, angular: bool = False) -> np.ndarray:
    """Value noise [len(y), len(x)] in 0..1, period 1 in both coordinates; `angular` interpolates by straight lines.

    It is interpolated axis by axis from a lattice, so its cost is four passes over the result.
    """
    row, ty = _cells(dice, y.reshape(-1), angular)
    column, tx = _cells(dice, x.reshape(-1), angular)
    first, ty = column.min(), ty[:, None]
    columns = np.arange(first, column.max() + 2) % LATTICE
    values = _lattice()
    lines = values[row[:, None] % LATTICE, columns]
    lines += (values[(row[:, None] + 1) % LATTICE, columns] - lines) * ty
    column -= first
    result = lines.take(column, axis=1)
    result += (lines.take(column + 1, axis=1) - result) * tx
    return result


def relief(dice: Dice, p: Patch, period: float, stretch: float = 1.0, side: float = 1.0) -> np.ndarray:
    """Bumps of about `period` lit from above and from `side` (-1 left, 1 right), about -1..1; `stretch` widens them."""
    step = max(1, int(period * p.scale * 0.35 + 0.5))
    more = np.arange(1, step + 1, dtype=np.float32) / p.scale
    y, x = p.y.reshape(-1), p.x.reshape(-1)
    onward = more if x[-1] > x[0] else -more
    y, x = np.concatenate([y, y[-1] + more]), np.concatenate([x, x[-1] + onward])
    bumps = noise(dice, y * (1.0 / period), x * (1.0 / (period * stretch)))
    if side > 0:
        return (bumps[step:, :-step] - bumps[:-step, step:]) * 1.6
    return (bumps[step:, step:] - bumps[:-step, :-step]) * 1.6
