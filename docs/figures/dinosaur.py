"""Figures of methods that part a picture among slots."""

import torch

from docs.figures import drawing
from docs.figures.drawing import Grid
from docs.figures.runs import trained
from docs.figures.shared import classes_of, pair, read
from lightning_modules.slots.dinosaur import feature_groups, slot_ids

PICTURES = [0, 7, 13]
"""Scenes with several things."""


def dinosaur() -> Grid:
    """Slots, as many groups of the features alone, classes of the slots, and what is there."""
    seen = trained("dinosaur", "trainer.max_steps=1500")
    batch, source = seen.batch("val", PICTURES), seen.data.source("val")
    own = read(seen, batch["image"])[1]["own"]
    with torch.inference_mode():
        maps = [find(seen.model, batch) for find in (slot_ids, feature_groups)]
    classes, count = classes_of("own", seen, own, batch["image"]), seen.cfg.method.slots
    grid = Grid(["picture", "slots", "k-means of\nits features", "classes of\nthe slots", "objects", "truth"])
    for row, index in enumerate(PICTURES):
        things = torch.from_numpy(source.instances(index).masks)
        objects = torch.where(things.any(0), things.int().argmax(0), -1) if len(things) else -torch.ones(128, 128)
        cells = [drawing.ids(ids[row], count) for ids in maps]
        cells += [drawing.truth(classes[row], seen.meta), drawing.ids(objects.long(), 4)]
        grid.rows.append(pair(seen, batch, row, *cells))
    return grid
