"""The heads of a detector on boxes: classes, positions and masks, once, or three times one after the other (cascade).

torchvision's RoIHeads does matching, sampling and pooling. Here, and not there: DropLoss, absolute differences in place
of their smoothed form, one position for all classes, keyed draws, means over the boxes of all ranks. Sources: Mask
R-CNN (ICCV 2017), Cascade R-CNN (CVPR 2018), CutLER (CVPR 2023).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, project_masks_on_boxes
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops import boxes as box_ops
from torchvision.ops.poolers import LevelMapper

from models.detection.draws import KeyedSampler
from models.detection.losses import best_overlap, class_loss, drop_weights, shared_count

STAGES = {
    "mask_rcnn": ((0.5, (10.0, 10.0, 5.0, 5.0)),),
    "cascade": ((0.5, (10.0, 10.0, 5.0, 5.0)), (0.6, (20.0, 20.0, 10.0, 10.0)), (0.7, (30.0, 30.0, 15.0, 15.0))),
}
"""Of each detector the box heads: overlap from which a box is an object's, and the weights of its position."""
BOX_POOL, MASK_POOL = 7, 14
"""Cells of a side that boxes are pooled to."""
LEAST_SIDE = 1e-2
"""Px of a side below which a detection is nothing."""
USUAL, USUAL_LEVEL = 224, 4
"""Px of the side of a box that is pooled from the map of 2**4 px per cell; others from finer or coarser maps."""


class BoxHead(nn.Module):
    """Pooled boxes [R,C,7,7] to class logits [R,classes+1], the background first, and one position [R,4]."""

    def __init__(self, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.layers = TwoMLPHead(width * BOX_POOL**2, hidden)
        self.classes, self.position = nn.Linear(hidden, classes + 1), nn.Linear(hidden, 4)
        for layer, spread in ((self.classes, 0.01), (self.position, 0.001)):
            nn.init.normal_(layer.weight, std=spread)
            nn.init.zeros_(layer.bias)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layers(pooled)
        return self.classes(found), self.position(found)


def pool(strides: dict[str, int], cells: int) -> MultiScaleRoIAlign:
    """Cuts boxes out of the maps of these names and px per cell; torchvision would guess these from the first batch."""
    found = MultiScaleRoIAlign(list(strides), cells, 2)
    found.scales = [1 / stride for stride in strides.values()]
    levels = [round(math.log2(stride)) for stride in strides.values()]
    found.map_levels = LevelMapper(min(levels), max(levels), USUAL, USUAL_LEVEL)
    return found


class Heads(RoIHeads):
    """`drop`: DropLoss's overlap, None for none; it may be set between steps.

    In training gives losses, in evaluation detections, see `forward`.
    """

    def __init__(self, strides: dict[str, int], width: int, classes: int, settings: Any) -> None:
        """strides: px per cell of the pyramid's maps but the coarsest, by name; settings: `method.detector`."""
        stages = STAGES[settings.kind]
        super().__init__(
            pool(strides, BOX_POOL), None, None, stages[0][0], stages[0][0], settings.boxes,
            settings.positive, stages[0][1], settings.least_score, settings.nms, settings.most,
            pool(strides, MASK_POOL),
            MaskRCNNHeads(width, [settings.mask_width] * settings.mask_layers, 1),
            MaskRCNNPredictor(settings.mask_width, settings.mask_width, classes + 1),
        )  # fmt: skip
        self.stages = nn.ModuleList(BoxHead(width, settings.hidden, classes) for _ in stages)
        self.matchers = [Matcher(overlap, overlap, allow_low_quality_matches=False) for overlap, _ in stages]
        self.coders = [BoxCoder(weights) for _, weights in stages]
        self.fg_bg_sampler = KeyedSampler(settings.boxes, settings.positive, "boxes")
        self.drop: float | None = settings.drop

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Pyramid maps, boxes [N,4] and (height, width) of every picture -> detections (`boxes` [m,4], `scores` [m],
        `labels` int64 [m] from 1, `masks` [m,1,28,28] as shares; none in training) and losses (none in evaluation).

        targets: `boxes` float [G,4], `labels` int64 [G] from 1, `masks` [G,H,W].
        """
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        found = self._boxes(features, proposals, image_shapes)
        pooled = self.mask_roi_pool(features, [one["boxes"] for one in found], image_shapes)
        shares = maskrcnn_inference(self.mask_predictor(self.mask_head(pooled)), [one["labels"] for one in found])
        return [one | {"masks": part} for one, part in zip(found, shares, strict=True)], {}

    def _stage(
        self, number: int, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Logits [R,C+1] and positions [R,4] of a box head; of several each passes its share of the gradient on."""
        pooled = self.box_roi_pool(features, boxes, shapes)
        if len(self.stages) > 1:
            pooled = ScaledGradient.apply(pooled, 1 / len(self.stages))
        return self.stages[number](pooled)

    def _moved(self, number: int, positions: Tensor, boxes: list[Tensor]) -> list[Tensor]:
        """The boxes after a head: [N,4] of every picture, with gradient."""
        counts = [len(part) for part in boxes]
        return list(self.coders[number].decode(positions, boxes)[:, 0].split(counts))

    def _losses(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]],
    ) -> dict[str, Tensor]:
        boxes, matched, labels, _ = self.select_training_samples(proposals, targets)
        first, losses = (boxes, matched, labels), {}
        true = [target["boxes"] for target in targets]
        for number in range(len(self.stages)):
            logits, positions = self._stage(number, features, boxes, shapes)
            moved = self._moved(number, positions.detach(), boxes)
            overlaps = torch.cat([best_overlap(*pair) for pair in zip(moved, true, strict=True)])
            classes, weights = torch.cat(labels), drop_weights(overlaps, self.drop)
            count = shared_count(len(classes), logits)
            ending = "" if len(self.stages) == 1 else f"_{number + 1}"
            losses[f"class{ending}"] = class_loss(logits, classes, weights, count)
            losses[f"box{ending}"] = self._box_loss(number, positions, boxes, matched, labels, true) / count
            if number + 1 < len(self.stages):
                boxes = [box_ops.clip_boxes_to_image(*pair) for pair in zip(moved, shapes, strict=True)]
                matched, labels = self._matched(number + 1, boxes, targets)
        return losses | {"mask": self._mask_loss(features, shapes, targets, *first)}

    def _matched(
        self, number: int, boxes: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The labelled object of every box, and its class or 0, by the overlap that a head asks for."""
        self.proposal_matcher = self.matchers[number]
        found = self.assign_targets_to_proposals(
            boxes, [target["boxes"] for target in targets], [target["labels"] for target in targets]
        )
        self.proposal_matcher = self.matchers[0]
        return found

    def _box_loss(
        self, number: int, positions: Tensor, boxes: list[Tensor], matched: list[Tensor], labels: list[Tensor],
        true: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Sum of the absolute differences of positions over boxes that are an object's."""
        inside = torch.cat(labels) > 0
        wanted = [
            own[index] if len(own) else torch.zeros_like(part)
            for own, index, part in zip(true, matched, boxes, strict=True)
        ]
        aims = self.coders[number].encode(wanted, boxes)
        return F.l1_loss(positions[inside], torch.cat(list(aims))[inside].to(positions), reduction="sum")

    def _mask_loss(
        self, features: dict[str, Tensor], shapes: list[tuple[int, int]], targets: list[dict[str, Tensor]],
        boxes: list[Tensor], matched: list[Tensor], labels: list[Tensor],
    ) -> Tensor:  # fmt: skip
        """Mean binary cross-entropy over the pixels of the masks of boxes that are an object's."""
        inside = [own > 0 for own in labels]
        places = [part[own] for part, own in zip(boxes, inside, strict=True)]
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, places, shapes)))
        classes = torch.cat([own[chosen] for own, chosen in zip(labels, inside, strict=True)])
        count = shared_count(len(classes), logits)
        if not len(classes):
            return logits.sum() * 0
        side = logits.shape[-1]
        aims = [
            project_masks_on_boxes(target["masks"], place, index[own], side)
            for target, place, index, own in zip(targets, places, matched, inside, strict=True)
            if len(place)
        ]
        own = logits[torch.arange(len(classes), device=logits.device), classes]
        return F.binary_cross_entropy_with_logits(own, torch.cat(aims).to(own), reduction="sum") / (count * side**2)

    def _boxes(
        self, features: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """Detections without masks: the last head's boxes, with the mean of all heads' shares of the classes."""
        shares = []
        for number in range(len(self.stages)):
            logits, positions = self._stage(number, features, boxes, shapes)
            boxes = self._moved(number, positions, boxes)
            boxes = [box_ops.clip_boxes_to_image(*pair) for pair in zip(boxes, shapes, strict=True)]
            shares.append(logits.softmax(1)[:, 1:])
        mean = torch.stack(shares).mean(0).split([len(part) for part in boxes])
        return [self._kept(*pair) for pair in zip(boxes, mean, strict=True)]

    def _kept(self, boxes: Tensor, shares: Tensor) -> dict[str, Tensor]:
        """The detections of a picture: boxes [N,4] with shares [N,C], each class by itself freed of its doubles."""
        count, classes = shares.shape
        labels = torch.arange(1, classes + 1, device=boxes.device).repeat(count)
        boxes, scores = boxes.repeat_interleave(classes, 0), shares.flatten()
        sides = (boxes[:, 2:] - boxes[:, :2]).amin(1)
        able = (scores > self.score_thresh) & (sides >= LEAST_SIDE)
        boxes, scores, labels = boxes[able], scores[able], labels[able]
        rows = box_ops.batched_nms(boxes, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return {"boxes": boxes[rows], "scores": scores[rows], "labels": labels[rows]}


class ScaledGradient(torch.autograd.Function):
    """The same values; their gradient times a factor."""

    @staticmethod
    def forward(context: Any, values: Tensor, factor: float) -> Tensor:
        context.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * context.factor, None
