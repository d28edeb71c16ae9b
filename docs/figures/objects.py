"""Figures of the methods that begin with objects."""

import torch

from docs.figures import drawing
from docs.figures.drawing import Grid
from docs.figures.runs import staged, trained
from docs.figures.shared import TRAIN, classes_of, pair
from pseudo_labels.views import Saliency


def maskcontrast() -> Grid:
    """The mask of a picture, its two crops, what the salience learns of it, and the classes of the objects."""
    seen = trained("maskcontrast", "data.train_count=400")
    masks = Saliency(staged(seen)["masks"])
    batch = seen.views(TRAIN)
    with torch.inference_mode():
        features = seen.model.features(batch["image"])
        salience = seen.model.seen_objects(features)[2].sigmoid()
        classes = classes_of("own", seen, seen.model.scores(features), batch["image"])
    grid = Grid(["picture", "its mask", "query", "key", "salience", "classes", "truth"])
    for row, index in enumerate(TRAIN):
        shown = drawing.picture(batch["image"][row])
        mask = torch.from_numpy(masks.read(index, shown.shape[:2])) == 1
        crops = [
            drawing.lit(drawing.picture(batch[name][row]), batch[f"{name}.pseudo"][row] == 1)
            for name in ("query", "key")
        ]
        cells = [drawing.lit(shown, mask), *crops, drawing.shades(salience[row], 0.0, 1.0)]
        grid.rows.append(pair(seen, batch, row, *cells, drawing.truth(classes[row], seen.meta)))
    return grid
