"""From the levels of a backbone to the maps of a feature pyramid, one a scale.

Sources: FPN (CVPR 2017) for networks with several strides; ViTDet (ECCV 2022) for one map of a transformer.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from common.errors import ConfigError


class Pyramid(nn.Module):
    """Levels [B,C_l,h_l,w_l] -> maps [B,width,h,w] by name, the finest first; `strides` has px per cell of each.

    A network whose levels have different strides gets FPN, and every other cell of the coarsest map as one more. One
    with a single stride s, as transformers have, gets its levels side by side, seen at s/2 (by a transposed
    convolution), s, 2s and 4s (means of cells).

    Raises:
        ConfigError: levels of which some, but not all, share a stride.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], width: int) -> None:
        super().__init__()
        self.single = len(set(strides)) == 1
        if not self.single and len(set(strides)) < len(strides):
            raise ConfigError(
                f"backbone.levels: have {', '.join(map(str, strides))} px per cell; a detector needs levels of "
                "different strides, so set backbone.output_stride=null or name fewer levels"
            )
        self.order = sorted(range(len(strides)), key=lambda level: strides[level])
        if self.single:
            stride = strides[0]
            self.strides = [stride // 2, stride, 2 * stride, 4 * stride]
            self.finer = nn.ConvTranspose2d(sum(channels), width, 2, stride=2)
            self.same = nn.Conv2d(sum(channels), width, 1)
            self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in self.strides)
        else:
            self.strides = [strides[level] for level in self.order]
            self.strides.append(2 * self.strides[-1])
            self.fpn = FeaturePyramidNetwork(
                [channels[level] for level in self.order], width, extra_blocks=LastLevelMaxPool()
            )

    @property
    def names(self) -> list[str]:
        """Names of the maps, in order."""
        return [str(number) for number in range(len(self.strides))]

    def forward(self, levels: Sequence[Tensor]) -> "OrderedDict[str, Tensor]":
        if not self.single:
            found = self.fpn(OrderedDict((str(i), levels[level]) for i, level in enumerate(self.order)))
            return OrderedDict(zip(self.names, found.values(), strict=True))
        joined = torch.cat(list(levels), 1)
        same = self.same(joined)
        maps = [self.finer(joined), same, *(F.avg_pool2d(same, size, ceil_mode=True) for size in (2, 4))]
        return OrderedDict(
            (name, smooth(part)) for name, smooth, part in zip(self.names, self.smooth, maps, strict=True)
        )
