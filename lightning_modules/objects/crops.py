"""What objects look like: a vector for each mask of a training picture, as COMUS and MaskDistill describe them."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.base.transforms import Geometry
from grouping import salience
from lightning_modules.families.graph_cuts import patch_of, stage_cells, stage_geometry
from models.backbone import Backbone
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, Results, new_record, whole_patches

VECTORS = ("crop", "mean")
"""Of an object: the class token of its box as a picture of its own (the mean of its map, where the network has no
trained class token), or the mean of the picture's own map inside the mask."""
AT_ONCE = 64
"""Crops that go through the network together."""


class ObjectVectors(MapStep):
    """The objects of every training picture that are large enough: `masks` bool [n,h,w], `boxes` float32 [n,4] (px of
    the file), `scores` [n] and `features` float32 [n,D].

    Area and box are those of the mask at the size of the file. Dropped as `too_small` where no object is larger than
    `method.objects.min_area`, and as the masks were. No chance in it.
    """

    name, needs, counted = "objects", ("masks",), "masks"

    def __init__(self, backbone: Backbone, cfg: Any) -> None:
        super().__init__(backbone)
        self.method, self.interpolation = cfg.method, cfg.data.interpolation

    def settings(self) -> dict[str, Any]:
        return dict(self.method.objects) | {"class_token": self.backbone.class_token}

    def geometry(self) -> Geometry:
        return stage_geometry(self.method.stage, self.interpolation)

    def record_bytes(self) -> int:
        return stage_cells(self.method.stage, self) + 4 * self.backbone.dim + 1000

    def begin(self, results: Results) -> None:
        self.masks = results["masks"]

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images, settings = whole_patches(batch, patch_of(self.backbone)), self.method.objects
        maps = self.backbone.features(images).concat() if settings.vectors == "mean" else None
        found = []
        for row, image in enumerate(images):
            read = self.masks.read(int(batch["index"][row]))
            if not read.keep:
                found.append(new_record(batch, row, images, read.grid))
                found[-1].drop = read.drop
                continue
            masks, scores = torch.from_numpy(read.fields["masks"]), torch.from_numpy(read.fields["scores"])
            size = tuple(round(side * part) for side, part in zip(read.size, read.extent, strict=True))
            looked = [salience.object_box(salience.at_size(mask, size), settings.min_area) for mask in masks]
            keep = torch.tensor([kept for _, kept, _ in looked], dtype=torch.bool)
            boxes = torch.stack([box for _, _, box in looked])[keep]
            if maps is None:
                vectors = crop_vectors(self.backbone, image, seen_boxes(batch, row, image, boxes), settings.size)
            else:
                vectors = mean_vectors(maps[row], masks[keep].to(maps.device), read.extent, images, batch, row)
            fields = {"masks": masks[keep], "boxes": boxes.float(), "scores": scores[keep], "features": vectors}
            record = new_record(batch, row, images, read.grid, **fields)
            record.extent, record.drop = read.extent, "" if bool(keep.any()) else "too_small"
            found.append(record)
        return found


def shown_size(batch: dict[str, Any], row: int) -> tuple[int, int]:
    """Rows and columns of a picture of the batch that are not padding: the whole file, squeezed."""
    valid = batch["valid"][row]
    return int(valid.any(1).sum()), int(valid.any(0).sum())


def seen_boxes(batch: dict[str, Any], row: int, image: Tensor, boxes: Tensor) -> Tensor:
    """Boxes int64 [n,4] in px of the file as boxes of the picture that the network sees, a pixel at least."""
    scale = [side / whole for side, whole in zip(shown_size(batch, row), batch["size"][row].tolist(), strict=True)]
    found = (boxes * torch.tensor([scale[1], scale[0]] * 2, dtype=torch.float64)).round().long()
    most = torch.tensor([image.shape[2], image.shape[1]])
    low = torch.minimum(found[:, :2], most - 1)
    return torch.cat([low, torch.maximum(torch.minimum(found[:, 2:], most), low + 1)], dim=1)


def mean_vectors(
    maps: Tensor, masks: Tensor, extent: tuple[float, float], images: Tensor, batch: dict[str, Any], row: int
) -> Tensor:
    """Means float32 [n,D] of a map [D,h,w] of a picture inside masks bool [n,H,W], which cover `extent` of it."""
    own = [side / whole for side, whole in zip(images.shape[-2:], shown_size(batch, row), strict=True)]
    cells = [max(1, round(side * o / e)) for side, o, e in zip(masks.shape[-2:], own, extent, strict=True)]
    weights = F.adaptive_avg_pool2d(masks[:, : cells[0], : cells[1]].float(), tuple(maps.shape[-2:])).flatten(1)
    return weights @ maps.float().flatten(1).T / weights.sum(1, keepdim=True).clamp(min=1e-6)


def crop_vectors(backbone: Backbone, image: Tensor, boxes: Tensor, size: int | None) -> Tensor:
    """Vectors float32 [n,C] of the boxes int64 [n,4] of a picture [3,H,W], each a picture of its own; see VECTORS.

    size: side in px that crops are resized to, as COMUS does; None: each is as large as its box and filled up with the
    network's mean colour to whole patches at the right and below, as MaskDistill does. Crops of one shape go through
    the network together.
    """
    shapes: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
    for number, (left, top, right, bottom) in enumerate(boxes.tolist()):
        crop = image[:, top:bottom, left:right]
        if size is None:
            crop = filled_up(backbone, crop)
        else:
            crop = F.interpolate(crop[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
        shapes.setdefault(tuple(crop.shape[-2:]), []).append((number, crop))
    found: dict[int, Tensor] = {}
    for group in shapes.values():
        for first in range(0, len(group), AT_ONCE):
            numbers, crops = zip(*group[first : first + AT_ONCE], strict=True)
            features = backbone.features(torch.stack(crops))
            vectors = features.cls if backbone.class_token else features.concat().mean((2, 3))
            found |= dict(zip(numbers, vectors.float(), strict=True))
    return torch.stack([found[row] for row in range(len(boxes))]) if found else image.new_zeros(0, backbone.dim)


def filled_up(backbone: Backbone, crop: Tensor) -> Tensor:
    """A crop [3,h,w] on a canvas of whole patches, which is 0 to the network elsewhere."""
    multiple = max(backbone.patch_multiple, min(backbone.strides))
    height, width = (-(-side // multiple) * multiple for side in crop.shape[-2:])
    canvas = backbone.mean[0].expand(-1, height, width).to(crop).clone()
    canvas[:, : crop.shape[1], : crop.shape[2]] = crop
    return canvas
