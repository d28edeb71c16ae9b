"""Embedding heads of SegSort and HSG: from backbone maps to a vector a cell, trained together with the backbone.

Sources: SegSort (ICCV 2019), its PSP head; HSG (CVPR 2022), two 1x1 convolutions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError, one_of

KINDS = ("pointwise", "pyramid")
NORMS = ("batch", "group", "none")
POOLS = (1, 2, 3, 6)
"""Cells a side of the averages that the pyramid head adds."""
GROUPS = 8
"""Groups of a group norm; fewer where the channels cannot be split so."""


def pixel_head(kind: str, in_dim: int, hidden: int, dim: int, norm: str) -> nn.Module:
    """The head `method.head.kind`: maps [B,in_dim,h,w] -> [B,dim,h,w], not normalised. Raises ConfigError."""
    for key, value, known in (("kind", kind, KINDS), ("norm", norm, NORMS)):
        one_of(f"method.head.{key}", value, known)
    for key, value in (("head.hidden", hidden), ("dim", dim)):
        if value < 1:
            raise ConfigError(f"method.{key}={value}: must be at least 1")
    return (PyramidHead if kind == "pyramid" else PointwiseHead)(in_dim, hidden, dim, norm)


class PointwiseHead(nn.Sequential):
    """1x1 convolution, norm, ReLU, 1x1 convolution with bias."""

    def __init__(self, in_dim: int, hidden: int, dim: int, norm: str):
        super().__init__(*conv_block(in_dim, hidden, 1, norm), nn.Conv2d(hidden, dim, 1))


class PyramidHead(nn.Module):
    """Averages of the map over grids of 1, 2, 3 and 6 cells a side beside the map itself, then a 3x3 convolution."""

    def __init__(self, in_dim: int, hidden: int, dim: int, norm: str):
        super().__init__()
        self.pools = nn.ModuleList(nn.Sequential(*conv_block(in_dim, hidden, 1, norm)) for _ in POOLS)
        wide = in_dim + hidden * len(POOLS)
        self.merge = nn.Sequential(*conv_block(wide, hidden, 3, norm), nn.Conv2d(hidden, dim, 1))

    def forward(self, maps: Tensor) -> Tensor:
        size = maps.shape[-2:]
        pooled = [pool(F.adaptive_avg_pool2d(maps, cells)) for pool, cells in zip(self.pools, POOLS, strict=True)]
        wide = [F.interpolate(part, size=size, mode="bilinear", align_corners=False) for part in pooled]
        return self.merge(torch.cat([*wide, maps], dim=1))


def conv_block(in_dim: int, dim: int, side: int, norm: str) -> list[nn.Module]:
    """A convolution of `side` x `side` that keeps the size, its norm (NORMS), and a ReLU."""
    conv = nn.Conv2d(in_dim, dim, side, padding=side // 2, bias=norm == "none")
    if norm == "batch":
        return [conv, nn.BatchNorm2d(dim), nn.ReLU()]
    if norm == "group":
        groups = next(groups for groups in range(min(GROUPS, dim), 0, -1) if dim % groups == 0)
        return [conv, nn.GroupNorm(groups, dim), nn.ReLU()]
    return [conv, nn.ReLU()]
