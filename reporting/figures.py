"""Figures about one patch of a picture: its place, maps over the picture, patches that belong to it, an embedding.

A picture is uint8 [H,W,3] without padding. A map [h,w] has a value a patch, drawn as patches and not smoothed; its
patches lie over `frame` (height, width in px), which is the picture with its padding.

Figures have no paper of their own: their ink is read on a white page and on a dark one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from PIL import Image, ImageDraw

from reporting import panels

MARK = "#ff2d2d"
RED = (230, 40, 40)
INK = "#757a84"
"""Contrast 4.3 to white, 4.2 to the paper of a dark page (style.css)."""
ON_ANY_PAPER = {
    "figure.facecolor": "none", "text.color": INK, "axes.titlecolor": INK, "axes.labelcolor": INK,
    "axes.edgecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip
CELL = 250
"""Width of a picture in a gallery, px."""
AROUND = 4
"""Patches that a close view shows on each side of the patch."""


@dataclass(frozen=True)
class Spot:
    """The point that was asked for (x, y in px of the picture as it is seen) and the frame that patches divide."""

    point: tuple[float, float]
    frame: tuple[int, int]

    def box(self, grid: tuple[int, int]) -> tuple[float, float, float, float]:
        """Left, top, width and height, px, of its patch in a map [h,w]."""
        height, width = (side / count for side, count in zip(self.frame, grid, strict=True))
        return self.point[0] // width * width, self.point[1] // height * height, width, height


@dataclass(frozen=True)
class Heat:
    """A map [h,w] under a title; colours go from `low` to `high` (None: those of the map)."""

    title: str
    values: np.ndarray
    low: float | None = None
    high: float | None = None


@matplotlib.rc_context(ON_ANY_PAPER)
def heats(path: Path, picture: np.ndarray, spot: Spot, maps: Sequence[Heat], columns: int = 2) -> None:
    """Write maps over the grey picture, each with its scale; the patch is framed."""
    figure, axes = _axes(len(maps), columns, picture)
    grey = np.repeat(picture.mean(-1, keepdims=True), 3, axis=2).astype(np.uint8)
    for place, heat in zip(axes, maps, strict=True):
        _show(place, grey)
        height, width = spot.frame
        drawn = place.imshow(
            heat.values, cmap="inferno", vmin=heat.low, vmax=heat.high, alpha=0.72, interpolation="nearest",
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        )  # fmt: skip
        _crop(place, picture)
        _frame(place, spot.box(heat.values.shape))
        place.set_title(heat.title, fontsize=9, loc="left")
        bar = figure.colorbar(drawn, ax=place, fraction=0.045, pad=0.02)
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=7, length=0)
    figure.savefig(path, bbox_inches="tight")


@matplotlib.rc_context(ON_ANY_PAPER)
def labels(
    path: Path, picture: np.ndarray, ids: np.ndarray, spot: Spot, grid: tuple[int, int], names: Sequence[str], colours
) -> None:
    """Write the picture, and its label map ids [H,W] over it, both with the point and its patch of a map [h,w]; below,
    the names of the K clusters that occur, those of one name once."""
    figure, axes = _axes(2, 2, picture)
    for place, shown in zip(axes, (picture, panels.overlay(picture, ids, colours, 0.7)), strict=True):
        _show(place, shown)
        _frame(place, spot.box(grid))
        place.plot(*spot.point, marker="+", color="white", markersize=13, markeredgewidth=3.2)
        place.plot(*spot.point, marker="+", color=MARK, markersize=12, markeredgewidth=1.6)
    entries = {names[i]: tuple(part / 255 for part in colours[i]) for i in np.unique(ids).tolist()}
    handles = [Patch(facecolor=colour, edgecolor="#c8c8cc", label=name) for name, colour in entries.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight")


def gallery(
    path: Path, pictures: Sequence[np.ndarray], masks: Sequence[np.ndarray], captions: Sequence[str], spot: Spot
) -> None:
    """Write pictures that are paled but for the patches of a mask, bool [H,W] each; the spot is framed in the first."""
    text, gap, tiles = panels.font(12), panels.GAP, []
    for number, (picture, mask) in enumerate(zip(pictures, masks, strict=True)):
        faded = np.where(mask[..., None], picture, 0.22 * picture + 0.62 * 255).astype(np.uint8)
        height = max(1, round(faded.shape[0] * CELL / faded.shape[1]))
        tile = Image.fromarray(faded).resize((CELL, height), Image.Resampling.NEAREST)
        outline = np.asarray(Image.fromarray(mask).resize((CELL, height), Image.Resampling.NEAREST))
        drawn = np.array(tile)
        drawn[_edges(outline)] = RED
        tile = Image.fromarray(drawn)
        if number == 0:
            scale = CELL / picture.shape[1]
            x, y = (part * scale for part in spot.point)
            pen = ImageDraw.Draw(tile)
            for radius, colour in ((9, (255, 255, 255)), (8, (20, 20, 24)), (7, (255, 255, 255))):
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), outline=colour)
        tiles.append(tile)
    across = min(4, len(tiles))
    rows = [tiles[first : first + across] for first in range(0, len(tiles), across)]
    tops = [gap]
    for row in rows:
        tops.append(tops[-1] + max(tile.height for tile in row) + 22 + gap)
    sheet = Image.new("RGBA", (gap + across * (CELL + gap), tops[-1]))
    pen = ImageDraw.Draw(sheet)
    for number, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        x, y = gap + number % across * (CELL + gap), tops[number // across]
        sheet.paste(tile, (x, y))
        while caption and text.getlength(caption) > CELL:
            caption = caption[:-2] + "…"
        pen.text((x, y + tile.height + 3), caption, fill=INK, font=text)
    sheet.save(path)


@matplotlib.rc_context(ON_ANY_PAPER)
def neighbourhood(path: Path, picture: np.ndarray, spot: Spot, weights: np.ndarray) -> None:
    """Write a close view of the patch with the weights [h,w] of its neighbours as numbers; NaN: none."""
    left, top, width, height = spot.box(weights.shape)
    figure, (place,) = _axes(1, 1, np.zeros((10, 10)))
    _show(place, picture)
    known = np.argwhere(np.isfinite(weights))
    highest = float(np.nanmax(weights)) or 1.0
    for row, column in known.tolist():
        corner, value = (column * width - 0.5, row * height - 0.5), float(weights[row, column])
        share = value / highest
        place.add_patch(Rectangle(corner, width, height, facecolor=(1, 0.18, 0.18, 0.6 * share), edgecolor="white"))
        middle = corner[0] + width / 2, corner[1] + height / 2
        text = place.text(*middle, f"{value:.3g}", ha="center", va="center", fontsize=9, color="white", weight="bold")
        text.set_bbox({"facecolor": "#1c1e24", "alpha": 0.55, "pad": 1.5, "linewidth": 0})
    _frame(place, (left, top, width, height))
    place.set_xlim(left - AROUND * width - 0.5, left + (AROUND + 1) * width - 0.5)
    place.set_ylim(top + (AROUND + 1) * height - 0.5, top - AROUND * height - 0.5)
    figure.savefig(path, bbox_inches="tight")


@matplotlib.rc_context(ON_ANY_PAPER)
def scatter(
    path: Path,
    points: np.ndarray,
    ids: np.ndarray,
    anchor: int,
    names: Sequence[str],
    colours,
    axes_names: Sequence[str],
) -> None:
    """Write points [n,2] in the colours of their clusters ids [n], the anchor's ringed; names beside it, the most
    frequent first."""
    figure = Figure(figsize=(8.6, 6.2), dpi=110)
    FigureCanvasAgg(figure)
    place = figure.add_subplot()
    palette = np.asarray(colours, dtype=np.float64) / 255
    place.set_facecolor("#e6e8ec")  # pale colours must be seen too
    place.scatter(*points.T, c=palette[ids], s=9, linewidths=0)
    place.scatter(*points[anchor], s=190, facecolors="none", edgecolors="white", linewidths=4)
    place.scatter(*points[anchor], s=190, facecolors="none", edgecolors="#1c1e24", linewidths=1.8)
    place.scatter(*points[anchor], c=[palette[ids[anchor]]], s=40, edgecolors="#1c1e24", linewidths=0.8)
    place.set_xlabel(axes_names[0], fontsize=9)
    place.set_ylabel(axes_names[1], fontsize=9)
    place.tick_params(labelsize=7, length=2)
    place.spines[["top", "right"]].set_visible(False)
    order = np.argsort(-np.bincount(ids, minlength=len(palette)), kind="stable")
    entries = {names[i]: palette[i] for i in order.tolist() if (ids == i).any()}
    handles = [
        Line2D([], [], marker="o", linestyle="", markersize=5, color=colour, label=name)
        for name, colour in entries.items()
    ]
    place.legend(handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, bbox_inches="tight")


def _axes(count: int, columns: int, picture: np.ndarray) -> tuple[Figure, list[Axes]]:
    """A figure with a cell for each of `count` pictures of this shape."""
    columns = min(columns, count)
    rows = -(-count // columns)
    width = 9.6 / columns if columns > 1 else 5.2
    height = max(1.2, 0.9 * width * picture.shape[0] / picture.shape[1] + 0.3)
    figure = Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def _show(place: Axes, picture: np.ndarray) -> None:
    place.imshow(picture)
    place.set_axis_off()


def _crop(place: Axes, picture: np.ndarray) -> None:
    place.set_xlim(-0.5, picture.shape[1] - 0.5)
    place.set_ylim(picture.shape[0] - 0.5, -0.5)


def _frame(place: Axes, box: tuple[float, float, float, float]) -> None:
    left, top, width, height = box
    for colour, line in (("white", 3.2), (MARK, 1.6)):
        corner = left - 0.5, top - 0.5
        place.add_patch(Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line))


def _edges(mask: np.ndarray) -> np.ndarray:
    """Pixels of a mask that touch one outside of it."""
    padded = np.pad(mask, 1)
    kept = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~kept
