"""The first step of TransFGU's offline stage: sliding windows of every picture and their tokens.

Source: Yin et al., TransFGU (ECCV 2022). B pictures, R crops of a picture, D channels of
a token, h x w patches.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import chance
from datamodules.base.transforms import Geometry, both_sides
from grouping.windows import crop_boxes
from lightning_modules.families.graph_cuts import patch_of
from models.backbone import Backbone
from models.class_token import ClassPath, class_path, pooled_path, token_width, tokens
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, new_record

FOREGROUND, BACKGROUND = 1, 0
"""Kinds of crops; where they are not told apart all are FOREGROUND."""


class Crops(MapStep):
    """Fields `features` float32 [R,D] (tokens, as they are), `boxes` int32 [R,4] (y0 x0 y1 x1, exclusive, px of a
    picture `zoom` times as large as the stage's) and `kinds` int8 [R]; dropped as `no_crop` where no window belongs to
    a bank.

    Each window is encoded as a square picture of its own, as released, and none twice: windows of several scales that
    are the same count once. banks: `all`, `foreground` or `split`. Without `all` a window is foreground where more than
    `foreground` of its pixels are (attention of the class token above its mean), background where more than
    `background` of them are not, and left out else.
    """

    name = "crops"
    counted = "features"
    lost = 1
    """Rows and columns of pixels at a window's end that it does not get, as released."""

    def __init__(self, backbone: Backbone, cfg: Any, banks: str, token: str) -> None:
        super().__init__(backbone)
        self.cfg, self.crops, self.stage = cfg, cfg.method.crops, cfg.method.stage
        self.banks, self.token, self.seed = banks, token, int(cfg.seed)
        self.sides = tuple(self.crops.zoom * side for side in both_sides(self.stage.size))
        self.side = self.crops.size or min(both_sides(self.stage.size))
        patch = patch_of(backbone)
        self.grid = tuple(-(-side // patch) for side in self.sides)
        boxes, _ = crop_boxes(*self.grid, list(self.crops.scales))
        self.windows = list(dict.fromkeys(map(tuple, boxes.tolist())))

    @property
    def most(self) -> int:
        """R at most."""
        return min(len(self.windows), self.crops.max_per_image or len(self.windows))

    def settings(self) -> dict[str, Any]:
        own = {name: self.crops[name] for name in ("zoom", "foreground", "background", "max_per_image", "pictures")}
        drawn = self.most < len(self.windows) or self.crops.pictures is not None
        own |= {"banks": self.banks, "token": self.token, "scales": list(self.crops.scales)}
        return own | self.encoding() | {"seed": self.seed if drawn else None}

    def encoding(self) -> dict[str, Any]:
        """What else the tokens of given windows hang on, by name."""
        return {"side": self.side, "passes": self.crops.batch_size}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg, self.sides)

    def record_bytes(self) -> int:
        return self.most * (4 * token_width(self.backbone, self.token) + 17) + 1000

    def pictures(self, count: int) -> list[int]:
        most = self.crops.pictures
        if most is None or most >= count:
            return list(range(count))
        draw = chance.numpy_generator(self.seed, "transfgu.pictures")
        return sorted(draw.permutation(count)[:most].tolist())

    def announce(self, count: int) -> str:
        whole = 0 if self.banks == "all" else count
        patches = -(-self.side // patch_of(self.backbone))
        weights = sum(value.numel() for value in self.backbone.parameters())
        work = 2.0 * weights * patches**2 * self.most * count / 1e12
        return (
            f"at most {self.most * count} crops of {self.side} px ({self.most} of the {len(self.windows)} windows of "
            f"each of {count} pictures) and {whole} whole pictures go through the backbone, about {work:.3g} TFLOP; "
            "method.crops.max_per_image and method.crops.pictures bound it"
        )

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images, found = batch["image"], []
        masks, encode = self.seen(images)
        for row in range(len(images)):
            boxes, kinds = self.chosen(None if masks is None else masks[row], int(batch["index"][row]))
            fields = {"features": encode(row, boxes), "boxes": boxes.int(), "kinds": kinds.to(torch.int8)}
            found.append(new_record(batch, row, images, self.grid, **fields))
            found[-1].drop = "" if len(boxes) else "no_crop"
        return found

    def seen(self, images: Tensor) -> tuple[Tensor | None, Callable[[int, Tensor], Tensor]]:
        """Foreground bool [B,h,w], None where all windows count; and tokens [R,D] of boxes of a picture by its row."""
        masks = None if self.banks == "all" else foreground(class_path(self.backbone, images, self.token))
        return masks, lambda row, boxes: self.encode(images[row], boxes)

    def chosen(self, mask: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        """Boxes int64 [R,4] in px and kinds int64 [R] of a picture; mask: foreground bool [h,w]."""
        patch = patch_of(self.backbone)
        boxes = torch.tensor(self.windows) * patch
        # Both ends of a window are patches inside it.
        boxes[:, 2:] = torch.minimum(boxes[:, 2:] + patch, torch.tensor(self.sides)) - self.lost
        kinds = torch.full((len(boxes),), FOREGROUND)
        if mask is not None:
            shares = box_means(mask[None], boxes, self.sides)[:, 0].cpu()
            fore, back = shares > self.crops.foreground, 1 - shares > self.crops.background
            kinds = torch.where(fore, FOREGROUND, BACKGROUND)
            kept = fore if self.banks == "foreground" else fore | back
            boxes, kinds = boxes[kept], kinds[kept]
        if len(boxes) > self.most:
            draw = chance.numpy_generator(self.seed, "transfgu.crops", index)
            rows = np.sort(draw.permutation(len(boxes))[: self.most])
            boxes, kinds = boxes[rows], kinds[rows]
        return boxes, kinds

    def encode(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Tokens [R,D] of boxes of a picture [3,H,W], each as a square picture of its own."""
        found = [image.new_zeros(0, token_width(self.backbone, self.token))]
        for part in boxes.split(self.crops.batch_size):  # of one picture alone: a record depends on no other
            crops = [image[None, :, y0:y1, x0:x1] for y0, x0, y1, x1 in part.tolist()]
            size = (self.side, self.side)
            crops = [F.interpolate(crop, size, mode="bilinear", align_corners=False) for crop in crops]
            found.append(tokens(self.backbone, torch.cat(crops), self.token))
        return torch.cat(found)


class PooledCrops(Crops):
    """As `Crops`, but a window's token is the mean of the picture's own map inside it: one pass a picture, for pooled
    tokens.

    The picture is the one that maps of concepts are made of. Windows that are encoded by themselves are larger there
    than in the picture and have borders of their own; convolutions answer to both, and centroids of such tokens are
    not where features of the picture are.
    """

    lost = 0

    def encoding(self) -> dict[str, Any]:
        return {"pooled": True}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg, both_sides(self.stage.size))

    def announce(self, count: int) -> str:
        return (
            f"at most {self.most * count} windows, {self.most} of the {len(self.windows)} of each of {count} pictures: "
            "means of its own features, one pass a picture"
        )

    def seen(self, images: Tensor) -> tuple[Tensor | None, Callable[[int, Tensor], Tensor]]:
        maps = self.backbone.features(images).concat()
        masks = None if self.banks == "all" else foreground(pooled_path(maps))
        return masks, lambda row, boxes: box_means(maps[row], boxes, self.sides).float()


def stage_geometry(cfg: Any, size: tuple[int, int]) -> Geometry:
    """Whole pictures squeezed to `size`, resized as `method.stage.interpolation` says, or as all others."""
    return Geometry(size, "none", cfg.method.stage.interpolation or cfg.data.interpolation)


def box_means(maps: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Means float64 [R,C] of a map [C,h,w] over boxes [R,4] (y0 x0 y1 x1, exclusive, px) of the picture of `size` that
    it covers: a cell counts by the part of it that is inside."""
    y0, x0, y1, x1 = boxes.to(maps.device).T

    def parts(low: Tensor, high: Tensor, count: int, side: int) -> Tensor:  # px of each cell inside each box, [R,count]
        edges = torch.arange(count + 1, device=maps.device, dtype=torch.float64) * (side / count)
        return (torch.minimum(high[:, None], edges[1:]) - torch.maximum(low[:, None], edges[:-1])).clamp(min=0)

    down, across = parts(y0, y1, maps.shape[1], size[0]), parts(x0, x1, maps.shape[2], size[1])
    sums = torch.einsum("rh,chw,rw->rc", down, maps.double(), across)
    return sums / ((y1 - y0) * (x1 - x0))[:, None]


def foreground(path: ClassPath) -> Tensor:
    """Patches whose attention is above the picture's mean: bool [B,h,w]."""
    attention = path.patch_attention
    return attention > attention.mean((1, 2), keepdim=True)
