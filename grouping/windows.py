"""Sliding windows over a grid of patches: the crops whose tokens TransFGU clusters.

Source: Yin et al., TransFGU (ECCV 2022).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError


def crop_boxes(height: int, width: int, scales: Sequence[float]) -> tuple[Tensor, list[int]]:
    """Boxes int64 [R,4], y0 x0 y1 x1 in patches with both ends inside, and how many each scale gives.

    A scale is the share of the shorter side that a window's side L has. Centres lie half a window apart; further ones
    let windows touch the left and right border (in those rows), the top and bottom (in those columns), and the lower
    right corner. In the order of the scales, then of the rows.

    Raises ConfigError for a scale that leaves no patch, or is not from 0 to 1.
    """
    rows, columns = torch.arange(height), torch.arange(width)
    found = []
    for scale in scales:
        side = int(min(height * scale, width * scale))
        if not 0 < scale <= 1 or side < 1:
            raise ConfigError(
                f"method.crops.scales: {scale:g} of {min(height, width)} patches is no window; give shares above "
                f"{1 / min(height, width):.2g}, at most 1"
            )
        half = side / 2
        inside = (
            ((rows - half >= 0) & (rows + half < height))[:, None] & (columns - half >= 0) & (columns + half < width)
        )
        down, across = rows % half == 0, columns % half == 0
        top, bottom = rows - half == 0, rows + half == height - 1
        left, right = columns - half == 0, columns + half == width - 1
        kept = down[:, None] & (across | left | right) | ((top | bottom)[:, None] & across)
        kept = (kept | bottom[:, None] & right) & inside
        centres = kept.nonzero()
        found.append(torch.cat([(centres - half).ceil(), (centres + half).floor()], 1).long())
    return torch.cat(found), [len(boxes) for boxes in found]
