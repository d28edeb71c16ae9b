"""Figures of methods that learn dense representations."""

import torch

from docs.figures import drawing
from docs.figures.drawing import Cell, Grid
from docs.figures.runs import trained
from docs.figures.shared import TRAIN
from lightning_modules.representations.crops import GLOBALS, crop_boxes, cut, shared_boxes
from lightning_modules.representations.leopart import head_maps
from losses.self_distillation import sinkhorn_targets


@torch.no_grad()
def leopart() -> Grid:
    """The part that a large and a small crop share: clusters that the teacher gives it in one, and that the network
    predicts from the other."""
    seen = trained("leopart")
    model, settings, views = seen.model, seen.cfg.method, seen.views(TRAIN)
    names = (GLOBALS[0], "local0")
    large, small = (views[name] for name in names)
    assigned = head_maps(model.teacher_head.copy, model.teacher(large).concat())[1]
    grid = len(TRAIN), *assigned.shape[2:]
    rows = assigned.movedim(1, -1).flatten(0, 2)
    targets = sinkhorn_targets(rows, settings.sinkhorn.epsilon, settings.sinkhorn.iterations)
    targets = targets.unflatten(0, grid).movedim(-1, 1)
    predicted = head_maps(model.head, model.features(small).concat())[1]
    boxes, _ = crop_boxes([views[f"{name}.params"] for name in names])
    sizes = torch.tensor([tuple(reversed(part.shape[-2:])) for part in (large, small)])
    pixels = shared_boxes(boxes, sizes)
    cells = pixels / model.backbone.stride
    parts = [
        cut(maps, cells[:, own, [1 - own]], settings.cells)[:, 0].argmax(1)
        for own, maps in enumerate((targets, predicted))
    ]
    found = Grid(
        ["picture", "a large crop", "clusters of\nthe teacher", "a small crop", "clusters of\nwhat both show",
         "predicted from\nthe small crop"]
    )  # fmt: skip
    for row in range(len(TRAIN)):
        crops = [
            Cell(drawing.picture(view[row]), box=box)
            for view, box in zip((large, small), (pixels[row, 0, 1] - 0.5, pixels[row, 1, 0] - 0.5), strict=True)
        ]
        ids = [drawing.ids(part[row], settings.prototypes) for part in (targets.argmax(1), *parts)]
        found.rows.append([drawing.picture(views["image"][row]), crops[0], ids[0], crops[1], *ids[1:]])
    return found
