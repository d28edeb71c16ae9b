"""What several figures share: the pictures they are of, and what read-outs and stages say of them."""

import torch
from torch import Tensor

from docs.figures import drawing
from docs.figures.drawing import Grid
from docs.figures.runs import Seen
from engine.stages.panels import cell as stage_cell
from evaluation import readout
from lightning_modules.base.relations import Seen as Picture

VAL, TRAIN = [1, 4, 7], [3, 20, 41]
"""Pictures of the scenes that figures are of."""


def pair(seen: Seen, batch: dict, row: int, *cells: object) -> list:
    """The picture, some cells, the truth."""
    return [drawing.picture(batch["image"][row]), *cells, drawing.truth(batch["label"][row], seen.meta)]


def of_stage(seen: Seen, views: dict, counts: dict[str, int]) -> Grid:
    """Views of an offline stage of training pictures; `counts`: ids of a view that mean the same in every picture."""
    grid, source = Grid(["picture", *views, "truth"]), seen.data.source("train")
    for index in TRAIN:
        image, label = source.read(index)
        cells = []
        for name, view in views.items():
            found = stage_cell(view, index, image.shape[:2])
            cells.append(found if found.ndim == 3 else drawing.ids(found, counts.get(name)))
        grid.rows.append([image, *cells, drawing.truth(torch.from_numpy(label), seen.meta)])
    return grid


@torch.inference_mode()
def read(seen: Seen, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes, and the score maps of every probe."""
    return seen.model.read(images)


def codes_of_clusters(seen: Seen, images: Tensor) -> Tensor:
    """The class that each pixel's k-means cluster was matched to; -1: none."""
    return classes_of("kmeans", seen, read(seen, images)[1]["kmeans"], images)


def classes_of(probe: str, seen: Seen, scores: Tensor, images: Tensor) -> Tensor:
    """The class that the cluster of each pixel, by a probe's score maps, was matched to; -1: none."""
    clusters = readout.predict(scores, tuple(images.shape[-2:]))
    return torch.as_tensor(seen.checkpoint["labelfree"]["clusters"][probe])[clusters]


@torch.inference_mode()
def looked_at(seen: Seen, image: Tensor) -> Picture:
    """A picture as `relations` wants it."""
    features = seen.model.features(image[None])
    return Picture("", image, tuple(image.shape[-2:]), features, seen.model.embed(features))


def regions(maps: Tensor, count: int) -> object:
    """Region ids in colours, dark outside of the picture."""
    return drawing.ids(maps.where((maps >= 0) & (maps < count), -1), count)
