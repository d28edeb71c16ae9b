"""Affine maps of views: drawn, applied to pictures and maps of ids, combined with crops, and turned back.

A map is float32 [2,3] in unit coordinates (x, y) from -1 to 1, which end at the outer edges of a picture
(`align_corners=False`): where a pixel of the result is taken from.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.spec import Affine
from datamodules.base.transforms import Replay


def draw_affine(spec: Affine, count: int, draw: np.random.Generator) -> Tensor:
    """Maps [count,2,3] about the centre, with rotation a, shear b and scale s: rows (s cos a, -s sin(a+b)) and
    (s sin a, s cos(a+b))."""
    angles = np.deg2rad(draw.uniform(-spec.rotation, spec.rotation, size=count))
    sheared = angles + np.deg2rad(draw.uniform(-spec.shear, spec.shear, size=count))
    scale = draw.uniform(*spec.scale, size=count)
    zeros = np.zeros(count)
    rows = [[np.cos(angles), -np.sin(sheared), zeros], [np.sin(angles), np.cos(sheared), zeros]]
    return torch.from_numpy((np.array(rows) * scale).transpose(2, 0, 1).astype(np.float32))


def of_replay(params: Replay) -> Tensor:
    """A crop and flip as maps [B,2,3]."""
    top, left, height, width = params.boxes.unbind(1)
    frame_height, frame_width = params.source
    across, down = width / frame_width, height / frame_height
    zeros = torch.zeros_like(across)
    signed = torch.where(params.flip, -across, across)
    rows = [
        torch.stack([signed, zeros, (2 * left + width) / frame_width - 1], dim=1),
        torch.stack([zeros, down, (2 * top + height) / frame_height - 1], dim=1),
    ]
    return torch.stack(rows, dim=1)


def combined(first: Tensor, second: Tensor) -> Tensor:
    """The map of a view that was taken by `second` from one that was taken by `first`, all [B,2,3]."""
    linear = first[:, :, :2] @ second[:, :, :2]
    offset = first[:, :, :2] @ second[:, :, 2:] + first[:, :, 2:]
    return torch.cat([linear, offset], dim=2)


def inverse(maps: Tensor) -> Tensor:
    """The maps [B,2,3] that undo `maps`."""
    linear = torch.linalg.inv(maps[:, :, :2])
    return torch.cat([linear, -linear @ maps[:, :, 2:]], dim=2)


def warped(pictures: Tensor, maps: Tensor) -> Tensor:
    """Pictures float32 [B,C,H,W] through maps [B,2,3]: bilinear, 0 outside."""
    grid = F.affine_grid(maps, list(pictures.shape), align_corners=False)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def warped_ids(ids: Tensor, maps: Tensor, fill: int) -> Tensor:
    """Integer or bool maps [B,H,W] through maps [B,2,3]: the nearest pixel; outside `fill`, in bool maps False."""
    height, width = ids.shape[-2:]
    grid = F.affine_grid(maps, [len(ids), 1, height, width], align_corners=False)
    columns, rows = (((grid[..., axis] + 1) * side / 2).floor().long() for axis, side in ((0, width), (1, height)))
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    flat = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
    found = ids.flatten(1).gather(1, flat.flatten(1)).view_as(ids)
    return found & inside if ids.dtype == torch.bool else torch.where(inside, found, fill)
