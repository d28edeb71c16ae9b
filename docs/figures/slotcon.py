"""SlotCon's figure: what prototypes stand for, by the pictures that show them best."""

import torch

from docs.figures import drawing
from docs.figures.drawing import Grid
from docs.figures.runs import trained
from evaluation import readout
from models.slots.prototypes import cosines, picture_scores

PICTURES, ROWS, COLUMNS = 60, 4, 5


def slotcon() -> Grid:
    """Of the prototypes that win most: the pictures of highest score, and the pixels that they win there."""
    seen = trained("slotcon", "trainer.max_steps=100", "data.batch_size=8", "evaluation.kmeans.pictures=20")
    batch = seen.batch("train", list(range(PICTURES)))
    with torch.inference_mode():
        scores = cosines(seen.model.embed(seen.model.features(batch["image"])), seen.model.teacher.prototypes)
    won = readout.predict(scores, tuple(batch["image"].shape[-2:]))
    found = picture_scores(scores)
    grid = Grid(["shows it best", *(f"{rank}." for rank in range(2, COLUMNS + 1))])
    for prototype in torch.bincount(won.flatten(), minlength=scores.shape[1]).topk(ROWS).indices.tolist():
        near = found[:, prototype].topk(COLUMNS).indices.tolist()
        grid.rows.append([drawing.lit(drawing.picture(batch["image"][n]), won[n] == prototype) for n in near])
    return grid
