"""Resizing of pictures and maps of ids, by name: libraries do it in different ways, and releases hang on theirs."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


@dataclass(frozen=True)
class Rule:
    """How a picture is resized, `bilinear` or by its nearest pixels, and whether by Pillow or as tensors."""

    bilinear: bool
    tensor: bool = False
    """False: Pillow's; bilinear with antialias, nearest to the centre of a new pixel. True: as tensors of torch and
    arrays of OpenCV; bilinear of four neighbours whatever the scale, nearest to the top left corner of a new pixel."""


INTERPOLATIONS = {
    "faithful": Rule(bilinear=False),
    "nearest": Rule(bilinear=False),
    "bilinear": Rule(bilinear=True),
    "bilinear_plain": Rule(bilinear=True, tensor=True),
    "nearest_corner": Rule(bilinear=False, tensor=True),
}
"""How pictures are resized; "faithful": as STEGO, HP and EAGLE released it, which is Pillow's nearest; "bilinear_plain"
and, in the offline stages of its COCO runs, "nearest_corner": as TransFGU. Maps of ids are resized by the nearest of
the same library."""


def resize_picture(picture: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """A picture uint8 [H,W,3], or [H,W,4] with infrared, at `size` (H, W), by one of INTERPOLATIONS."""
    rule = INTERPOLATIONS[interpolation]
    if picture.shape[:2] == size:
        return picture
    if picture.shape[2] > 3 and not rule.tensor:  # Pillow would take the fourth channel for transparency
        return np.dstack([resize_picture(part, size, interpolation) for part in (picture[..., :3], picture[..., 3:])])
    if picture.shape[2] == 1 and not rule.tensor:
        picture = picture[..., 0]
    if not rule.tensor:
        how = Image.Resampling.BILINEAR if rule.bilinear else Image.Resampling.NEAREST
        return np.asarray(Image.fromarray(picture).resize(size[::-1], how))
    if not rule.bilinear:
        return at_corners(picture, size)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False).round_()
    return resized[0].permute(1, 2, 0).to(torch.uint8).numpy()


def resize_ids(ids: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """A map of ids [H,W] (uint8 as it is, others as int32) at `size`, beside a picture that `interpolation` resizes."""
    if ids.shape == size:
        return ids
    if ids.dtype not in (np.uint8, np.int32):
        ids = ids.astype(np.int32)
    if INTERPOLATIONS[interpolation].tensor:
        return at_corners(ids, size)
    return np.asarray(Image.fromarray(ids).resize(size[::-1], Image.Resampling.NEAREST))


def at_corners(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """OpenCV's INTER_NEAREST of an array [H,W] or [H,W,C]: a new pixel is the one that its top left corner lies in."""
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1.0 / (new / old))).astype(np.int64), old - 1)
        for old, new in zip(array.shape[:2], size, strict=True)
    )
    return array[rows[:, None], columns[None, :]]
