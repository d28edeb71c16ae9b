"""Pictures of pseudo-labels: a few training pictures beside what a stage gave them."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

from common.palette import default_palette
from common.spec import IGNORE, ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.files.reading import UnreadableError
from pseudo_labels.views import Shades, Strongest, View
from reporting import panels


def write_panel(path: Path, data: SegmentationDataModule, views: Mapping[str, View], count: int) -> None:
    """Write a png of up to `count` pictures, evenly chosen from the training set, with the maps of each view.

    Ids are cluster ids (0 is the background where the view has one); places without a label are dark. The last column
    is the truth, where a training picture has one: for the eye alone, nothing else of a stage sees it.
    """
    source, meta = data.source("train"), data.meta
    marks = dict(zip(meta.names, map(tuple, panels.class_colours(meta).tolist()), strict=True)) if meta.names else {}
    step = max(1, len(source) // max(1, count))
    rows = []
    for index in range(step // 2, len(source), step):
        if len(rows) == count:
            break
        try:
            image, truth = source.read(index)
        except UnreadableError:
            continue
        shown = {name: cell(view, index, image.shape[:2]) for name, view in views.items()}
        if truth is not None and meta.has_labels:
            shown["truth"] = painted(truth, meta)
        rows.append(panels.Row(image, shown, None, source.id(index)))
    path.parent.mkdir(parents=True, exist_ok=True)
    named = any("truth" in row.maps for row in rows) and len(marks) <= panels.MAX_NAMED
    panels.save(path, rows, ClassMeta(), marks=marks if named else None)


def write_maps(folder: Path, view: View) -> None:
    """Write the map of every picture that was kept as `<id>.png`, 8 bit, at the size of the picture; 255 = no label."""
    for record in view.source.each([]):
        if record.keep:
            path = folder / f"{record.id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            panels.index_png(path, view.read(record.index, record.size))


def cell(view: View, index: int, size: tuple[int, int]) -> np.ndarray:
    """Ids [H,W] with -1 where there is no label; shades as a picture uint8 [H,W,3], of a concept in its own colour."""
    found = view.read(index, size)
    if isinstance(view, Strongest):
        record = view.source.read(index, view.fields)
        if not record.keep:
            return np.zeros((*size, 3), np.uint8)
        colours = np.array(default_palette(len(record.fields["class_map"])), np.float64)
        return (found[..., None] / 255 * colours[view.concept(record)]).round().astype(np.uint8)
    if isinstance(view, Shades):
        return (matplotlib.colormaps["viridis"](found.astype(np.uint8))[..., :3] * 255).round().astype(np.uint8)
    return np.where(found == IGNORE, -1, found)


def painted(truth: np.ndarray, meta: ClassMeta) -> np.ndarray:
    """Class ids [H,W] in the colours of the data set, dark where there is none: uint8 [H,W,3]."""
    known = (truth >= 0) & (truth < meta.num_classes)
    colours = np.concatenate([panels.class_colours(meta), np.array([panels.VOID], np.uint8)])
    return colours[np.where(known, truth, meta.num_classes)]
