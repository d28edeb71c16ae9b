"""The decoder of PiCIE: lateral 1x1 convolutions of all levels of a backbone, added up from coarse to fine."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FPN(nn.Module):
    """Levels [B,C_l,h_l,w_l] -> maps [B,dim,h,w] on the grid of the finest level.

    Every level becomes `dim` channels by a 1x1 convolution with bias; from the coarsest on, the sum so far is enlarged
    to the grid of the next finer level (bilinear, align_corners False) and its lateral map is added. No further
    convolution, no norm, no activation. Levels of one grid (a transformer's) are added as they are. Source: PiCIE
    (CVPR 2021); the shape of the pyramid is that of FPN (CVPR 2017) without its 3x3 convolutions.

    channels, strides: C_l and pixels per cell of the levels, in any order; `laterals` stand in the same order.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.laterals = nn.ModuleList(nn.Conv2d(width, dim, 1) for width in channels)
        self.order = sorted(range(len(strides)), key=lambda level: -strides[level])
        """Levels from the coarsest to the finest; of one grid, in their given order."""

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """float32 outside autocast; gradients reach every level."""
        total: Tensor | None = None
        for level in self.order:
            lateral = self.laterals[level](levels[level])
            if total is None:
                total = lateral
                continue
            if total.shape[-2:] != lateral.shape[-2:]:
                total = F.interpolate(total, size=lateral.shape[-2:], mode="bilinear", align_corners=False)
            total = total + lateral
        return total

    @torch.no_grad()
    def begin(self, weight: Tensor, bias: Tensor) -> None:
        """Let the maps be weight @ features + bias: weight [D,C] of the channels of all levels in their order, bias
        [D], D at most `dim`; further channels are 0. Enlargement is linear, so it may come after."""
        parts = weight.split([lateral.in_channels for lateral in self.laterals], dim=1)
        for lateral, part in zip(self.laterals, parts, strict=True):
            lateral.weight.zero_()
            lateral.bias.zero_()
            lateral.weight[: len(part), :, 0, 0] = part
        self.laterals[self.order[0]].bias[: len(bias)] = bias
