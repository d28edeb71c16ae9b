"""Mask R-CNN on the levels of any backbone, class-agnostic or with classes: proposals, boxes, masks.

Of torchvision: pyramid, anchors, proposals, pooling and heads. Sources: Mask R-CNN (ICCV 2017), CutLER (CVPR 2023).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from common.errors import one_of
from models.detection.draws import KeyedSampler
from models.detection.heads import STAGES, Heads
from models.detection.losses import shared_count
from models.detection.pyramid import Pyramid

RATIOS = (0.5, 1.0, 2.0)
"""Height by width of anchors."""
INSIDE = 0.5
"""Share from which a pixel is in a mask."""


@dataclass(frozen=True)
class Found:
    """m objects of one picture, the surest first; no gradient."""

    boxes: Tensor
    """[m,4]: x0 y0 x1 y1, px, ends exclusive."""
    scores: Tensor
    """[m], from 0 to 1."""
    classes: Tensor
    """int64 [m], from 0."""
    masks: Tensor
    """bool [m,H,W]."""


def targets_of(ids: Tensor, classes: Tensor | None = None) -> dict[str, Tensor]:
    """Labels of a picture from a map of its objects, int [H,W]: 0 nothing, 255 not known, each other value one object.

    classes: int64 [n], class from 0 of the object of id 1, 2, …; None: all are of class 0. Boxes are made of masks.
    """
    names = ids.unique()
    names = names[(names > 0) & (names < 255)]
    masks = ids == names[:, None, None]
    labels = torch.ones_like(names) if classes is None else classes.to(ids.device)[names - 1] + 1
    return masks_target(masks, labels)


def masks_target(masks: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Labels of a picture from masks bool [n,H,W] of objects, none of them empty, with classes from 1, int64 [n]."""
    rows, columns = masks.any(2), masks.any(1)
    edges = [(line.int().argmax(1), line.shape[1] - line.flip(1).int().argmax(1)) for line in (columns, rows)]
    (left, right), (top, bottom) = edges
    boxes = torch.stack([left, top, right, bottom], 1).float()
    return {"boxes": boxes, "labels": labels.long(), "masks": masks.to(torch.uint8)}


class Proposals(RegionProposalNetwork):
    """torchvision's, with keyed draws, absolute differences of positions, and means over the boxes of all ranks."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        positive, negative = (torch.cat(part) for part in self.fg_bg_sampler(labels))
        seen = positive | negative
        count = shared_count(int(seen.sum()), objectness)
        known, wanted = torch.cat(labels), torch.cat(regression_targets)
        boxes = F.l1_loss(pred_bbox_deltas[positive], wanted[positive].to(pred_bbox_deltas), reduction="sum")
        logits = objectness.flatten()[seen]
        return F.binary_cross_entropy_with_logits(logits, known[seen], reduction="sum") / count, boxes / count


class Detector(nn.Module):
    """Finds objects in pictures by the levels of their backbone.

    settings (`method.detector`): kind (see `heads.STAGES`), width (channels of the pyramid), hidden, mask_width,
    mask_layers, anchor (px of the side of the finest map's anchors; each coarser map has twice the one before),
    proposals (in training, after doubles are removed) and test_proposals, proposal_nms, boxes and positive (sampled of
    a picture, and the share of objects among them), anchors (sampled of a picture), drop (DropLoss's overlap, null:
    none), least_score, nms, most (detections of a picture).

    Raises:
        ConfigError: an unknown kind, or levels that make no pyramid.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], classes: int, settings: Any) -> None:
        super().__init__()
        one_of("method.detector.kind", settings.kind, STAGES)
        self.pyramid = Pyramid(channels, strides, settings.width)
        sizes = tuple((int(settings.anchor * 2**number),) for number in range(len(self.pyramid.strides)))
        anchors = AnchorGenerator(sizes, (RATIOS,) * len(sizes))
        self.proposals = Proposals(
            anchors, RPNHead(settings.width, len(RATIOS)), 0.7, 0.3, settings.anchors, 0.5,
            {"training": 2 * settings.test_proposals, "testing": settings.test_proposals},
            {"training": settings.proposals, "testing": settings.test_proposals}, settings.proposal_nms,
        )  # fmt: skip
        self.proposals.fg_bg_sampler = KeyedSampler(settings.anchors, 0.5, "anchors")
        pooled = dict(list(zip(self.pyramid.names, self.pyramid.strides, strict=True))[:-1])
        self.heads = Heads(pooled, settings.width, classes, settings)

    def losses(
        self, levels: Sequence[Tensor], size: tuple[int, int], targets: list[dict[str, Tensor]],
        keys: Sequence[tuple[int, ...] | None],
    ) -> dict[str, Tensor]:  # fmt: skip
        """`objectness`, `anchor`, `class`, `box` and `mask` (of a cascade `class_1` and so on) of pictures of `size`.

        levels: of the backbone, [B,C,h,w], with gradient where it is trained. targets: see `targets_of`. keys: (seed,
        step, picture) of every picture, for what is drawn; None: the picture is passed over. Every rank has to call
        this in the same steps.
        """
        for sampler in (self.proposals.fg_bg_sampler, self.heads.fg_bg_sampler):
            sampler.keys = keys
        pictures, maps = self._pictures(levels, [size] * len(targets), size)
        boxes, losses = self.proposals(pictures, maps, targets)
        _, others = self.heads(maps, boxes, pictures.image_sizes, targets)
        own = {"objectness": losses["loss_objectness"], "anchor": losses["loss_rpn_box_reg"]}
        return own | others

    @torch.no_grad()
    def detect(
        self, levels: Sequence[Tensor], size: tuple[int, int], valid: Sequence[tuple[int, int]] | None = None
    ) -> list[Found]:
        """The objects of pictures of `size`, of which the upper left `valid` (height, width) are no padding; in
        evaluation mode."""
        count = len(levels[0])
        pictures, maps = self._pictures(levels, list(valid or [size] * count), size)
        boxes, _ = self.proposals(pictures, maps)
        found, _ = self.heads(maps, boxes, pictures.image_sizes)
        return [
            Found(
                one["boxes"], one["scores"], one["labels"] - 1,
                paste_masks_in_image(one["masks"], one["boxes"], size)[:, 0] >= INSIDE,
            )
            for one in found
        ]  # fmt: skip

    def _pictures(
        self, levels: Sequence[Tensor], shapes: list[tuple[int, int]], size: tuple[int, int]
    ) -> tuple[ImageList, dict[str, Tensor]]:
        maps = self.pyramid(levels)
        return ImageList(levels[0].new_empty(len(shapes), 0, *size), shapes), maps
