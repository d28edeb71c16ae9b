"""Objects one by one against their labels: average precision of boxes and of masks, as COCO counts it.

No class is looked at: all objects are one category, as in zero-shot evaluations of CutLER (CVPR 2023). The counting is
pycocotools' own code, which published figures come from, through torchmetrics.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from common import distributed
from evaluation.readouts import Readout

MOST = 100
"""Detections of a picture that count, those of highest score."""
KINDS = {"box": "bbox", "mask": "segm"}
"""Of precision, in our words and in those of torchmetrics."""
CUTS = {"AP": "map", "AP50": "map_50", "AP75": "map_75"}


@dataclass(frozen=True)
class Detections:
    """m objects that were found in one picture, in px of it."""

    masks: Tensor
    """bool [m,H,W]."""
    boxes: Tensor
    """[m,4]: x0 y0 x1 y1, ends exclusive."""
    scores: Tensor
    """[m]."""

    def id_map(self) -> Tensor:
        """int64 [H,W]: 0 nothing, 1 the object of highest score, and so on; where two overlap the better one."""
        ids = torch.zeros(self.masks.shape[1:], dtype=torch.int64, device=self.masks.device)
        for number, row in enumerate(self.scores.argsort(descending=True, stable=True).tolist(), start=1):
            ids = torch.where(self.masks[row] & (ids == 0), number, ids)
        return ids


class InstanceScore(Readout):
    """`val/instances/*`: `{box,mask}_{AP,AP50,AP75}` in percent over the pictures whose objects are known.

    The method gives `detections(images, valid)`, one `Detections` a picture. Nothing is logged where no picture has
    objects.
    """

    name = "instances"
    groups = ("instances",)
    instances = True

    def __init__(self, backend: str = "pycocotools") -> None:
        """backend: torchmetrics' word for the library that counts."""
        super().__init__()
        self.backend = backend
        self.precision, self.objects = self._new(), 0

    def _new(self) -> MeanAveragePrecision:
        """It gathers nothing by itself: torchmetrics wants as many pictures of every rank."""
        found = MeanAveragePrecision(
            iou_type=tuple(KINDS.values()), backend=self.backend, max_detection_thresholds=[1, 10, MOST],
            distributed_available_fn=lambda: False,
        )  # fmt: skip
        found.warn_on_many_detections = False
        return found

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        found: list[Detections] = model.detections(batch["image"], batch["valid"])
        for one, masks, crowd in zip(
            found, batch.get("instances", [None] * len(found)), batch.get("instances.crowd", [None] * len(found)),
            strict=True,
        ):  # fmt: skip
            if masks is not None:
                self.update(one, masks, crowd)
        return {"instances": torch.stack([one.id_map() for one in found])}

    def update(self, found: Detections, masks: Tensor, crowd: Tensor) -> None:
        """One picture: masks bool [n,H,W] and crowd bool [n] of its true objects."""
        best = found.scores.argsort(descending=True, stable=True)[:MOST]
        predicted = {"masks": found.masks[best], "boxes": found.boxes[best].float(), "scores": found.scores[best]}
        true = {"masks": masks, "boxes": boxes_of(masks), "iscrowd": crowd.long()}
        for part in (predicted, true):
            part["labels"] = torch.zeros(len(part["masks"]), dtype=torch.int64, device=masks.device)
        self.precision.update([predicted], [true])
        self.objects += int((~crowd).sum())

    def compute(self) -> dict[str, float]:
        names = list(self.precision.metric_state)
        own = {name: on_host(getattr(self.precision, name)) for name in names}
        ranks = distributed.objects((self.objects, own))
        if not sum(objects for objects, _ in ranks):
            return {}
        whole = self._new()
        for name in names:
            rows = zip_longest(*(states[name] for _, states in ranks), fillvalue=self)  # rank r has pictures r, r+world
            setattr(whole, name, [value for row in rows for value in row if value is not self])
        with warnings.catch_warnings():  # it takes states that were put in for a metric that saw nothing
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            found = whole.compute()
        return {
            f"{kind}_{cut}": 100 * float(found[f"{word}_{key}"])
            for kind, word in KINDS.items()
            for cut, key in CUTS.items()
        }

    def reset(self) -> None:
        self.precision.reset()
        self.objects = 0

    def protocol(self) -> str:
        return f"class-agnostic AP of boxes and masks (COCO, {MOST} detections a picture), at the size of evaluation"


def on_host(values: list[Any]) -> list[Any]:
    """A state of torchmetrics, a list of tensors or of what is no tensor, on the CPU."""
    return [value.cpu() if isinstance(value, Tensor) else value for value in values]


def boxes_of(masks: Tensor) -> Tensor:
    """The tight boxes of masks bool [n,H,W]: float32 [n,4], ends exclusive; zeros where a mask is empty."""
    boxes = []
    for axis in (1, 2):  # rows that a mask reaches, then: columns
        line = masks.any(3 - axis)
        size = line.shape[1]
        first = line.int().argmax(1) if size else line.new_zeros(len(line), dtype=torch.int64)
        last = size - line.flip(1).int().argmax(1)
        some = line.any(1)
        boxes.append((torch.where(some, first, 0), torch.where(some, last, 0)))
    (top, bottom), (left, right) = boxes
    return torch.stack([left, top, right, bottom], 1).float()
