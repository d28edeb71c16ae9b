"""Crops of one picture whose places are known, and maps of them cut to what two crops share.

Boxes are x0, y0, x1, y1 with pixel edges at whole numbers. B pictures, V views, C channels, R cells a side of a cut.
Sources: Leopart (CVPR 2022), SlotCon (NeurIPS 2022).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

from common.precision import real
from common.spec import Geometric, Meeting, Photometric, ViewSpec
from datamodules.base.transforms import Replay

GLOBALS = ("global0", "global1")
"""Names of the large crops."""


def local_names(count: int) -> tuple[str, ...]:
    return tuple(f"local{number}" for number in range(count))


def multi_crop(crops: Any, colour: Photometric) -> dict[str, ViewSpec]:
    """Views of two large crops and of `local_count` small ones, none mirrored, that all meet the large ones.

    crops: `{global,local}_size` px, `{global,local}_scale` shares of the picture's area, `local_count`, `overlap`: the
    least share of the picture's area that a small crop has in common with each large one; of the large ones twice that.
    """

    def view(kind: str, meets: Meeting | None) -> ViewSpec:
        geometric = Geometric(size=crops[f"{kind}_size"], scale=tuple(crops[f"{kind}_scale"]), flip_p=0.0)
        return ViewSpec(photometric=colour, geometric=geometric, meets=meets)

    first, second = GLOBALS
    found = {first: view("global", None), second: view("global", Meeting((first,), 2 * crops.overlap))}
    return found | {name: view("local", Meeting(GLOBALS, crops.overlap)) for name in local_names(crops.local_count)}


def crop_boxes(params: Sequence[Replay]) -> tuple[Tensor, Tensor]:
    """Where views lie in their source: boxes [B,V,4] in its pixels, and whether each is mirrored, bool [B,V]."""
    rows = torch.stack([one.boxes for one in params], dim=1)
    corner, sides = rows[..., :2].flip(-1), rows[..., 2:].flip(-1)
    return torch.cat([corner, corner + sides], dim=-1), torch.stack([one.flip for one in params], dim=1)


def shared_boxes(boxes: Tensor, sizes: Tensor, mirrored: Tensor | None = None) -> Tensor:
    """[B,V,V,4]: entry [b,v,u] is what views v and u of picture b share, in units of view v.

    boxes: [B,V,4] in pixels of the source. sizes: width and height [V,2] of each view, in whatever unit is wanted:
    pixels, cells of its map, or ones for shares. mirrored: bool [B,V], None for none; there the box is that in the
    mirrored view. A view and itself share the whole view. Views that do not meet have boxes of negative extent.
    """
    own, other, sizes = boxes[:, :, None], boxes[:, None], sizes[:, None].to(boxes)
    low, high = torch.maximum(own[..., :2], other[..., :2]), torch.minimum(own[..., 2:], other[..., 2:])
    scale = sizes / (own[..., 2:] - own[..., :2])
    low, high = (low - own[..., :2]) * scale, (high - own[..., :2]) * scale
    if mirrored is not None:
        turned = torch.stack([mirrored, torch.zeros_like(mirrored)], dim=-1)[:, :, None]  # x alone
        low, high = torch.where(turned, sizes - high, low), torch.where(turned, sizes - low, high)
    return torch.cat([low, high], dim=-1)


def cut(maps: Tensor, boxes: Tensor, size: int | tuple[int, int], mirrored: Tensor | None = None) -> Tensor:
    """Parts [B,n,C,R,R] of maps [B,C,h,w], each of n boxes [B,n,4] in cells resized to R x R by averaging bilinear
    samples, about one a cell; gradient flows to the maps. In float32 (float64 for float64 maps).

    mirrored: bool [B,n]; those parts are mirrored back. A box of negative extent gives zeros.
    """
    values = real(maps)
    low, high = boxes.split(2, dim=-1)
    boxes = torch.cat([low, torch.maximum(low, high)], dim=-1)  # torchvision asks for a negative number of samples
    with torch.autocast(values.device.type, enabled=False):
        parts = roi_align(values, [rows.to(values.dtype) for rows in boxes], size, aligned=True)
    parts = parts.unflatten(0, boxes.shape[:2])
    return parts if mirrored is None else torch.where(mirrored[..., None, None, None], parts.flip(-1), parts)
