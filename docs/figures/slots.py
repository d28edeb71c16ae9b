"""Figures of the methods with a few vectors for each picture."""

import torch

from docs.figures import drawing
from docs.figures.drawing import Grid
from docs.figures.runs import trained
from docs.figures.shared import VAL, classes_of, pair, regions


def acseg() -> Grid:
    """The regions of a picture's concepts, how alike patches are to two of them, and the classes of the regions."""
    seen = trained("acseg", "data.train_count=200", "trainer.max_steps=100")
    batch = seen.batch("val", VAL)
    with torch.inference_mode():
        features = seen.model.features(batch["image"])
        found = seen.model.regions(features)
        classes = classes_of("own", seen, seen.model.scores(features), batch["image"])
    grid = Grid(["picture", "regions", "largest", "second", "classes of\nregions", "truth"])
    for row, likeness in enumerate(found.likeness):
        largest = found.masks[row].flatten(1).sum(1).argsort(descending=True)[:2]
        cells = [drawing.shades(likeness[concept], 0.0, 1.0) for concept in largest]
        cells = [regions(found.ids[row], len(likeness)), *cells, drawing.truth(classes[row], seen.meta)]
        grid.rows.append(pair(seen, batch, row, *cells))
    return grid
