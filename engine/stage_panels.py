"""Pictures of pseudo-labels: a few training pictures beside what a stage gave them."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np

from common.spec import IGNORE, ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.reading import UnreadableError
from evaluation import panels
from pseudo_labels.views import Shades, View


def write_panel(path: Path, data: SegmentationDataModule, views: Mapping[str, View], count: int) -> None:
    """Write a png of up to `count` pictures, evenly chosen from the training set, with the maps of each view.

    Ids are cluster ids (0 is the background where the view has one); places without a label are dark. No label of the
    data set is read into it.
    """
    source = data.source("train")
    step = max(1, len(source) // max(1, count))
    rows = []
    for index in range(step // 2, len(source), step):
        if len(rows) == count:
            break
        try:
            image = source.read(index)[0]
        except UnreadableError:
            continue
        shown = {name: cell(view, index, image.shape[:2]) for name, view in views.items()}
        rows.append(panels.Row(image, shown, None, source.id(index)))
    path.parent.mkdir(parents=True, exist_ok=True)
    panels.save(path, rows, ClassMeta())


def write_maps(folder: Path, view: View) -> None:
    """Write the map of every picture that was kept as `<id>.png`, 8 bit, at the size of the picture; 255 = no label."""
    for record in view.source.each([]):
        if record.keep:
            path = folder / f"{record.id}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            panels.index_png(path, view.read(record.index, record.size))


def cell(view: View, index: int, size: tuple[int, int]) -> np.ndarray:
    """Ids [H,W] with -1 where there is no label; shades as a picture uint8 [H,W,3]."""
    found = view.read(index, size)
    if isinstance(view, Shades):
        return (matplotlib.colormaps["viridis"](found.astype(np.uint8))[..., :3] * 255).round().astype(np.uint8)
    return np.where(found == IGNORE, -1, found)
