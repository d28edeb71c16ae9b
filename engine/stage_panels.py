"""Pictures of pseudo-labels: a few training pictures beside what a stage gave them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from common.spec import IGNORE, ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.reading import UnreadableError
from evaluation import panels
from pseudo_labels.views import View


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
        maps = {name: view.read(index, image.shape[:2]) for name, view in views.items()}
        shown = {name: np.where(ids == IGNORE, -1, ids) for name, ids in maps.items()}
        rows.append(panels.Row(image, shown, None, source.id(index)))
    path.parent.mkdir(parents=True, exist_ok=True)
    panels.save(path, rows, ClassMeta())
