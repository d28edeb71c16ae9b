"""One object of each picture against its labels: overlap of the mask, and CorLoc of its box.

Labels of classes stand in for annotated boxes: every 8-connected component of a class that counts as an object has one.
Two touching objects of one class are one there, which annotated boxes would tell apart. Source: TokenCut (CVPR 2022),
LOST (BMVC 2021).
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torchmetrics import Metric

from common.spec import IGNORE, ClassMeta

EIGHT = np.ones((3, 3), bool)
HIT = 0.5
"""Overlap of boxes from which a picture counts as found."""


def object_classes(meta: ClassMeta, chosen: list[int]) -> tuple[int, ...]:
    """Ids of the classes that count as objects: the chosen ones, else things, else all beside a class `background`.

    Empty where nothing says which.
    """
    if chosen:
        return tuple(chosen)
    if meta.things:
        return tuple(meta.things)
    return tuple(i for i, name in enumerate(meta.names) if name != "background") if "background" in meta.names else ()


class ForegroundScore(Metric):
    """Masks and boxes of one object a picture. `compute` gives percent over all pictures that show an object:

    `iou` (mean over pictures of mask and objects), `acc` (mean share of pixels that are right), `corloc` (pictures
    whose box overlaps a true one by half), `objects` (a count: pictures that show one); NaN without any.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor

    def __init__(self, objects: tuple[int, ...], smallest: int = 16) -> None:
        """objects: class ids; smallest: px, components below it have no box (specks of a resized label map)."""
        super().__init__()
        self.objects, self.smallest = objects, smallest
        self.add_state("sums", torch.zeros(4, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, masks: Tensor, boxes: Tensor, labels: Tensor) -> None:
        """masks bool [B,H,W], boxes [B,4] (x0 y0 x1 y1, exclusive, px), labels int64 [B,H,W] with 255 = ignore."""
        for mask, box, label in zip(masks, boxes, labels, strict=True):
            known = label != IGNORE
            true = torch.isin(label, torch.tensor(self.objects, device=label.device)) & known
            if not bool(true.any()):
                continue
            mask = mask & known
            iou = (mask & true).sum() / (mask | true).sum()
            right = (mask == true)[known].double().mean()
            found = any(overlap(box.tolist(), other) >= HIT for other in self.true_boxes(label))
            self.sums += torch.stack([iou.double(), right, self.sums.new_tensor(float(found)), self.sums.new_ones(())])

    def true_boxes(self, label: Tensor) -> list[list[int]]:
        """The boxes of the components of each object class of a label map [H,W]."""
        ids, boxes = label.cpu().numpy(), []
        for value in np.intersect1d(np.unique(ids), self.objects):
            parts, _ = ndimage.label(ids == value, EIGHT)
            sizes = np.bincount(parts.ravel())
            for number, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
                if sizes[number] >= self.smallest:
                    boxes.append([columns.start, rows.start, columns.stop, rows.stop])
        return boxes

    def compute(self) -> dict[str, float]:
        iou, acc, hits, count = self.sums.tolist()
        share = 100 / count if count else float("nan")
        return {"iou": iou * share, "acc": acc * share, "corloc": hits * share, "objects": count}


def overlap(one: list[int], two: list[int]) -> float:
    """Intersection over union of two boxes; 0 for empty ones."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, two)]
    return width * height / (sum(areas) - width * height)
