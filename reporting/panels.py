"""Pictures of results: panels with a legend, the confusion figure, overlays and index maps."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from common.names import shown
from common.palette import default_palette
from common.spec import IGNORE, ClassMeta
from evaluation.matching import UNMATCHED, Scores

matplotlib.rcParams["text.parse_math"] = False  # a class may be called `$x`, which is no formula
VOID = (24, 24, 28)
"""Colour of pixels without a label."""
WRONG = (214, 39, 40)
"""Colour of pixels whose cluster was matched to another class than theirs."""
INK, FAINT, PAPER = (28, 30, 36), (110, 114, 122), (255, 255, 255)
GAP = 10
TALLEST = 8
"""Height of a cell at most, in widths."""
MAX_NAMED = 40
"""Longest legend; longer lists show only what occurs in the picture."""


@dataclass(frozen=True)
class Row:
    """One picture of a panel: float [3,H,W] in 0..1 or uint8 [H,W,3], its truth [H,W] or None, and id maps [H,W].

    `maps` goes from column name to ids: classes, or clusters where `save` is given a mapping for that column; or to a
    picture uint8 [H,W,3], which is shown as it is. Arrays or tensors, on any device. `strip`: colours (None: no
    box) and names of what is in this picture, below it.
    """

    image: object
    maps: Mapping[str, object]
    truth: object = None
    title: str = ""
    strip: Sequence[tuple[tuple[int, int, int] | None, str]] = ()


@dataclass
class _Legend:
    """Entries of the legend in order of first use: key -> (colour, text)."""

    entries: dict[tuple, tuple[tuple[int, int, int], str]] = field(default_factory=dict)

    def add(self, key: tuple, colour, text: str) -> None:
        self.entries.setdefault(key, (tuple(int(c) for c in colour), shown(text)))

    def ordered(self) -> list[tuple[tuple[int, int, int], str]]:
        return [self.entries[key] for key in sorted(self.entries)]


def save(
    path: str | Path,
    rows: Sequence[Row],
    meta: ClassMeta,
    mappings: Mapping[str, np.ndarray] | None = None,
    title: str = "",
    cell: int = 320,
    groups: Collection[str] = (),
    marks: Mapping[str, tuple[int, int, int]] | None = None,
) -> None:
    """Write one png: a row a picture, columns picture, truth (where there is one) and every map, a legend below.

    mappings: column -> [K] class of each cluster, -1 unmatched (`Scores.mapping`). Its clusters take the colour of
    their class, unmatched ones greyish hues. A column without a mapping shows class ids; where the data has no classes,
    every column shows ids in fixed colours that mean nothing in another one, so each has a legend of its own below it.
    Columns named in `groups` hold groups of one picture: fixed colours that the legend leaves out. cell: width of a
    picture in pixels. marks: text -> colour, more of the legend.
    """
    mappings = mappings or {}
    names = list(dict.fromkeys(name for row in rows for name in row.maps))
    with_truth = any(row.truth is not None for row in rows) and meta.has_labels
    legend, apart = _Legend(), {name: _Legend() for name in names if not meta.has_labels and name not in groups}
    if meta.has_labels and meta.num_classes <= MAX_NAMED:
        for i, colour in enumerate(class_colours(meta)):
            legend.add((0, i), colour, meta.names[i])
    grid = []
    for row in rows:
        cells = [_fit(Image.fromarray(as_picture(row.image)), cell, Image.Resampling.BICUBIC)]
        if with_truth:
            cells.append(None if row.truth is None else _paint(as_ids(row.truth), meta, None, legend, cell))
        for name in names:
            ids = row.maps.get(name)
            if ids is not None and name in groups:
                cells.append(_paint(as_ids(ids), ClassMeta(), None, _Legend(), cell))
                continue
            own = apart.get(name, legend)
            cells.append(None if ids is None else _paint(as_ids(ids), meta, mappings.get(name), own, cell))
        grid.append((cells, shown(row.title), [(colour, shown(text)) for colour, text in row.strip]))
    for place, (text, colour) in enumerate((marks or {}).items()):
        legend.add((3, place), colour, text)
    columns = ["picture", *(["truth"] if with_truth else []), *names]
    _compose(grid, columns, legend, title, cell, apart).save(path)


def class_colours(meta: ClassMeta) -> np.ndarray:
    """uint8 [C,3]: the data set's palette, or the default one where it has none for every class."""
    palette = meta.palette if len(meta.palette) >= meta.num_classes else default_palette(meta.num_classes)
    return np.array(palette[: meta.num_classes], dtype=np.uint8).reshape(-1, 3)


def cluster_colours(meta: ClassMeta, mapping, k: int) -> np.ndarray:
    """uint8 [K,3]: the colour of the matched class, a greyish hue where unmatched, fixed colours without classes.

    A mapping of None means that ids are classes, or clusters where `meta` has none.
    """
    if not meta.has_labels:
        return np.array(default_palette(k), dtype=np.uint8).reshape(-1, 3)
    classes = class_colours(meta)
    mapping = np.arange(k) if mapping is None else np.asarray(mapping)
    known = (mapping >= 0) & (mapping < len(classes))
    return np.where(known[:, None], classes[np.where(known, mapping, 0)], greyish(len(mapping)))


def greyish(n: int) -> np.ndarray:
    """uint8 [n,3]: pale mixtures of grey and the default palette, for clusters without a class."""
    light = 120 + 100 * (np.arange(n) * 0.618 % 1)[:, None]
    return np.clip(0.88 * light + 0.12 * np.array(default_palette(n)).reshape(-1, 3), 0, 255).astype(np.uint8)


def confidence(cosines) -> np.ndarray:
    """Cosines [H,W] of codes to their centroids as colours, uint8 [H,W,3]; negative ones as 0. See CONFIDENCE_MARKS."""
    return _shades(_numpy(cosines))


def _shades(values) -> np.ndarray:
    return (matplotlib.colormaps["viridis"](np.clip(values, 0.0, 1.0))[..., :3] * 255).round().astype(np.uint8)


CONFIDENCE_MARKS = {
    f"confidence {value:g}": tuple(colour)
    for value, colour in zip((0, 0.5, 1), _shades(np.array([0, 0.5, 1])).tolist(), strict=True)
}
"""Legend of `confidence`, for `save`."""


def errors(image, ids, truth, mapping) -> np.ndarray:
    """A grey picture with the labelled pixels that are wrong in red, unlabelled ones dark: uint8 [H,W,3].

    image: as in `Row`; ids [H,W] clusters, truth [H,W]; mapping [K]: class of each cluster, -1 (always wrong) without.
    """
    truth, grey = as_ids(truth), as_picture(image).astype(np.float32).mean(-1, keepdims=True)
    wrong = (truth != IGNORE) & (np.asarray(mapping)[as_ids(ids)] != truth)
    drawn = np.repeat(115 + 0.55 * grey, 3, axis=2)
    drawn[wrong] = 0.2 * drawn[wrong] + 0.8 * np.array(WRONG)
    drawn[truth == IGNORE] = 0.2 * drawn[truth == IGNORE] + 0.8 * np.array(VOID)
    return drawn.clip(0, 255).round().astype(np.uint8)


def as_picture(image) -> np.ndarray:
    """A picture as uint8 [H,W,3]: from floats [3,H,W] in 0..1 or from uint8 [H,W,3]; tensors or arrays. Of more
    channels than the three colours (infrared) the colours are shown."""
    array = _numpy(image)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array[..., :3])
    return np.ascontiguousarray((array[:3].clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))


def as_ids(ids) -> np.ndarray:
    """An id map [H,W] as int64."""
    return _numpy(ids).astype(np.int64)


def overlay(image, index_map, palette, alpha: float = 0.55) -> np.ndarray:
    """Colours of an index map [H,W] laid over a picture of the same size, with outlines: uint8 [H,W,3].

    alpha: opacity of the colours, 0..1. Ids outside the palette stay uncoloured.
    """
    picture, ids = as_picture(image).astype(np.float32), as_ids(index_map)
    palette = np.asarray(palette, dtype=np.float32).reshape(-1, 3)
    known = (ids >= 0) & (ids < len(palette))
    colours = palette[np.where(known, ids, 0)]
    opacity = np.where(known, alpha, 0.0)
    edge = np.zeros_like(known)
    edge[:, 1:] |= ids[:, 1:] != ids[:, :-1]
    edge[1:] |= ids[1:] != ids[:-1]
    opacity[edge & known] = max(alpha, min(1.0, alpha + 0.35))
    mixed = picture + opacity[..., None] * (colours - picture)
    return mixed.round().astype(np.uint8)


def index_png(path: str | Path, index_map, palette=None) -> None:
    """Write ids [H,W] as png whose pixel values are the ids: 8 bit with a palette, 16 bit grey beyond 255.

    Raises ValueError for ids below 0 or above 65535.
    """
    ids = as_ids(index_map)
    low, high = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if low < 0 or high > 65535:
        raise ValueError(f"{path}: ids must lie in 0..65535 for a png, got {low}..{high}")
    if high > 255:
        Image.fromarray(ids.astype(np.uint16)).save(path)
        return
    image = Image.fromarray(ids.astype(np.uint8))
    colours = np.asarray(default_palette(high + 1) if palette is None else palette, dtype=np.uint8).reshape(-1, 3)
    image.putpalette(colours[:256].flatten().tolist())
    image.save(path)


def legend_png(path: str | Path, names: Sequence[str], palette) -> None:
    """Write a picture of colour swatches and names."""
    legend = _Legend()
    for i, (name, colour) in enumerate(zip(names, np.asarray(palette).reshape(-1, 3), strict=False)):
        legend.add((0, i), colour, name)
    _compose([], [], legend, "", 900).save(path)


def confusion(path: str | Path, scores: Scores, meta: ClassMeta, title: str = "") -> None:
    """Write the confusion figure: true classes down, predicted classes across, each row in percent of its true pixels.

    Classes stand in the order of their pixels, the most frequent first, so that what counts most is at the top left.
    Numbers stand in the cells up to 30 classes. A last column holds unmatched clusters where there are any.
    """
    classes = scores.histogram.shape[1]
    table = scores.histogram.T.astype(np.float64)
    order = confusion_order(scores)
    table = table[order][:, [*order, classes]]
    names = [meta.names[i] if meta.num_classes == classes else str(i) for i in order]
    across = [*names, "unmatched"]
    if not table[:, classes].any():
        table, across = table[:, :classes], names
    pixels = table.sum(1, keepdims=True)
    share = np.divide(100 * table, pixels, out=np.full_like(table, np.nan), where=pixels > 0)
    side = max(4.5, 0.42 * classes + 2.2)
    figure = Figure(figsize=(side + 0.8, side), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = matplotlib.colormaps["Blues"].with_extremes(bad="#f0f0f0")
    drawn = axes.imshow(share, cmap=colours, vmin=0, vmax=100)
    size = 8 if classes <= 30 else 6
    axes.set_xticks(range(len(across)), across, rotation=60, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(range(classes), names, fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    axes.set_title(title or f"acc {scores.acc:.1f}  mIoU {scores.miou:.1f}", fontsize=10, loc="left")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if classes <= 30:
        for (y, x), value in np.ndenumerate(share):
            if value >= 0.5:
                ink = "white" if value > 55 else "#1c1e24"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02)
    bar.set_label("% of the true class", fontsize=8)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=7, length=0)
    figure.savefig(path, bbox_inches="tight")


def confusion_order(scores: Scores) -> list[int]:
    """Class ids from the most to the least frequent by their labelled pixels; ties by id."""
    pixels = scores.counts.sum(0)
    return sorted(range(len(pixels)), key=lambda i: -int(pixels[i]))


def _numpy(value) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _paint(ids: np.ndarray, meta: ClassMeta, mapping, legend: _Legend, cell: int) -> Image.Image:
    """An id map in its colours, fitted to a cell; what occurs is entered into the legend. Pictures stay as they are."""
    if ids.ndim == 3:
        return _fit(Image.fromarray(ids.astype(np.uint8)), cell, Image.Resampling.NEAREST)
    present = np.unique(ids)
    count = len(mapping) if mapping is not None else meta.num_classes or int(present.max()) + 1
    colours = cluster_colours(meta, mapping, max(1, count))
    inside = (ids >= 0) & (ids < len(colours))
    painted = np.where(inside[..., None], colours[np.where(inside, ids, 0)], np.array(VOID, dtype=np.uint8))
    for i in present.tolist():
        if not 0 <= i < len(colours):
            legend.add((2, 0), VOID, "not labelled")
        elif not meta.has_labels:
            legend.add((0, i), colours[i], f"id {i}")
        elif (target := i if mapping is None else int(mapping[i])) == UNMATCHED:
            legend.add((1, 0), greyish(1)[0], "unmatched cluster")
        else:
            legend.add((0, target), colours[i], meta.names[target])
    return _fit(Image.fromarray(painted), cell, Image.Resampling.NEAREST)


def _fit(image: Image.Image, width: int, how: Image.Resampling) -> Image.Image:
    """A picture at the width of a cell; narrower where it is so tall that it would fill the sheet."""
    factor = min(width / image.width, TALLEST * width / image.height)
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    return image if image.size == size else image.resize(size, how)


@lru_cache
def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """The sans serif that pictures are labelled with, px; it comes with matplotlib."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")), size)


def _compose(
    grid, columns: list[str], legend: _Legend, title: str, cell: int, apart: Mapping[str, _Legend] | None = None
) -> Image.Image:
    """Lay out title, header, rows of cells, the legends of single columns (`apart`) below them, and the common legend
    on white paper."""
    width = max(len(columns), 1) * (cell + GAP) + GAP
    entries = legend.ordered()
    slot, per_line = _slots(entries, width - GAP)
    blocks = {name: own.ordered() for name, own in (apart or {}).items() if own.entries}
    block = max([26 + 24 * -(-len(own) // _slots(own, cell)[1]) + GAP for own in blocks.values()], default=0)
    tallest = [max(part.height for part in cells if part is not None) for cells, *_ in grid]
    strips = [_slots(strip, width - GAP) for *_, strip in grid]
    below = [24 * -(-len(strip) // per) for (*_, strip), (_, per) in zip(grid, strips, strict=True)]
    heights = [
        tall + (22 if caption else 0) + lines for tall, (_, caption, _), lines in zip(tallest, grid, below, strict=True)
    ]
    top = (30 if title else 0) + (28 if columns else 0)
    lines = -(-len(entries) // per_line)
    height = GAP + top + sum(h + GAP for h in heights) + block + (lines * 24 + GAP if lines else 0)
    sheet = Image.new("RGB", (max(width, slot + 2 * GAP), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    y = GAP
    if title:
        draw.text((GAP, y), title, fill=INK, font=font(16, bold=True))
        y += 30
    if columns:
        for i, name in enumerate(columns):
            draw.text((GAP + i * (cell + GAP), y + 4), name, fill=INK, font=font(14, bold=True))
        y += 28
    for (cells, caption, strip), h, tall, slots in zip(grid, heights, tallest, strips, strict=True):
        for i, part in enumerate(cells):
            if part is not None:
                sheet.paste(part, (GAP + i * (cell + GAP), y))
        if caption:
            draw.text((GAP, y + tall + 4), caption, fill=FAINT, font=font(12))
        _swatches(draw, strip, GAP, y + tall + (22 if caption else 2), *slots)
        y += h + GAP
    for name, own in blocks.items():
        x = GAP + columns.index(name) * (cell + GAP)
        draw.text((x, y), f"ids of {name}", fill=INK, font=font(13, bold=True))
        _swatches(draw, own, x, y + 26, *_slots(own, cell))
    _swatches(draw, entries, GAP, y + block, slot, per_line)
    return sheet


def _slots(entries: Sequence, width: int) -> tuple[int, int]:
    """(width of an entry of a legend, entries a line), px."""
    slot = max([int(font(13).getlength(name)) for _, name in entries], default=0) + 40
    return slot, max(1, width // slot)


def _swatches(draw: ImageDraw.ImageDraw, entries: Sequence, left: int, top: int, slot: int, per_line: int) -> None:
    """Entries of a legend, line by line."""
    for i, (colour, name) in enumerate(entries):
        x, line = left + (i % per_line) * slot, top + (i // per_line) * 24
        if colour is not None:
            draw.rectangle((x, line + 2, x + 18, line + 18), fill=colour, outline=(200, 200, 204))
        draw.text((x + 25, line + 2), name, fill=INK if colour is not None else FAINT, font=font(13))
