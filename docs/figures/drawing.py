"""A grid of small pictures with a heading over each column, and what turns maps into pictures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.palette import default_palette
from common.spec import ClassMeta
from engine.stages.panels import painted
from reporting.panels import as_picture

INCHES, DPI = 1.45, 110
"""Width of a cell of the grid, and dots of an inch."""
COLOURS = 128
"""Of a file: a palette keeps it small."""
DIM = 0.3
"""Brightness of what is outside a mask."""


@dataclass(frozen=True)
class Cell:
    """A picture uint8 [H,W,3], a point (x, y) in px of it that a cross marks, and a box (left, top, right, bottom)."""

    picture: np.ndarray
    point: tuple[float, float] | None = None
    box: Sequence[float] | None = None


@dataclass
class Grid:
    """Headings of the columns (a line break where one is long), and rows of cells."""

    columns: Sequence[str]
    rows: list[list[Cell | np.ndarray]] = field(default_factory=list)


def save(path: Path, grid: Grid) -> None:
    """Write the grid as a png of `COLOURS` colours."""
    lines = max(heading.count("\n") for heading in grid.columns) + 1
    top = 0.2 * lines + 0.05
    width, height = INCHES * len(grid.columns), INCHES * len(grid.rows)
    figure = Figure(figsize=(width, height + top), dpi=DPI, facecolor="white")
    for number, row in enumerate(grid.rows):
        for column, cell in enumerate(row):
            shown = cell if isinstance(cell, Cell) else Cell(cell)
            bottom = (height - INCHES * (number + 1)) / (height + top)
            axes = figure.add_axes(
                (column / len(grid.columns), bottom, 0.965 / len(grid.columns), 0.965 * INCHES / (height + top))
            )
            axes.imshow(shown.picture, interpolation="nearest")
            axes.autoscale(False)
            axes.set_axis_off()
            if shown.point is not None:
                axes.plot(*shown.point, "x", color="white", markersize=11, markeredgewidth=4)
                axes.plot(*shown.point, "x", color="black", markersize=9, markeredgewidth=1.8)
            if shown.box is not None:
                left, over, right, under = (float(value) for value in shown.box)
                axes.plot([left, right, right, left, left], [over, over, under, under, over], color="white", lw=2)
            if number == 0:
                axes.set_title(grid.columns[column], fontsize=9, pad=4, linespacing=1.1)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)


def picture(image: Tensor) -> np.ndarray:
    """float [3,H,W] in 0..1 -> uint8 [H,W,3]."""
    return as_picture(image)


def truth(label: Tensor, meta: ClassMeta) -> np.ndarray:
    """The classes of a picture in the colours of the data set; for the eye alone."""
    return painted(label.numpy(), meta)


def ids(numbers: Tensor | np.ndarray, count: int | None = None) -> np.ndarray:
    """Whole numbers [h,w] in colours that mean nothing; dark where they are negative or 255. `count`: how many there
    are, so that several maps have the same colours."""
    values = np.asarray(numbers)
    none = (values < 0) | (values == 255)
    table = np.array(default_palette(max(2, count or int(values[~none].max(initial=0)) + 1)), np.uint8)
    return np.where(none[..., None], np.uint8(24), table[np.where(none, 0, values) % len(table)])


def shades(values: Tensor, low: float | None = None, high: float | None = None) -> np.ndarray:
    """Values [h,w] from dark (the lowest, or `low`) to yellow (the highest, or `high`)."""
    values = values.detach().float().numpy()
    low, high = values.min() if low is None else low, values.max() if high is None else high
    share = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
    return (matplotlib.colormaps["viridis"](share)[..., :3] * 255).round().astype(np.uint8)


def lit(image: np.ndarray, mask: Tensor) -> np.ndarray:
    """A picture [H,W,3] whose parts outside of a mask bool [h,w] are dark."""
    inside = F.interpolate(mask[None, None].float(), image.shape[:2], mode="nearest")[0, 0].numpy()
    return (image * (DIM + (1 - DIM) * inside[..., None])).round().astype(np.uint8)


def components(maps: Tensor) -> list[np.ndarray]:
    """The first three principal components of unit vectors [B,D,h,w] as red, green and blue, one picture each: where
    colours are alike, vectors are."""
    rows = F.normalize(maps.detach().float(), dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    rows = rows - rows.mean(0)
    axes = torch.linalg.eigh(rows.T @ rows)[1][:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # a solver's sign means nothing
    placed = rows @ axes
    low, high = placed.quantile(0.02, 0), placed.quantile(0.98, 0)
    colours = ((placed - low) / (high - low)).clamp(0, 1).mul(255).round().byte()
    return list(colours.view(maps.shape[0], *maps.shape[-2:], 3).numpy())
