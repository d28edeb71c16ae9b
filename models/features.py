"""What a backbone gives for a batch of pictures."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Features:
    """What a backbone gives for a batch of pictures. All tensors are float32."""

    levels: list[Tensor]
    """Maps [B,C,h,w] in the order of `backbone.levels`."""
    cls: Tensor | None = None
    """Class token [B,C] of the block behind `map`; None without one."""
    attention: Tensor | None = None
    """Logits q k^T / sqrt(d) [B,heads,T,T] after query and key norms and rotation, before the softmax."""
    qkv: Tensor | None = None
    """Queries, keys, values [3,B,heads,T,d] as projected: before query and key norms and before rotation."""
    keys: list[Tensor] | None = None
    """Maps [B,C,h,w] of the patches' keys as projected, heads side by side, of the blocks that were asked for."""
    prefix: int = 0
    """Tokens of T that belong to no patch (class token, registers); they come first."""

    @property
    def map(self) -> Tensor:
        """The last entry of `levels`."""
        return self.levels[-1]

    def concat(self) -> Tensor:
        """All levels on the finest grid: [B, sum C, h, w]; coarser ones by bilinear interpolation."""
        size = max((level.shape[-2:] for level in self.levels), key=lambda hw: hw[0] * hw[1])
        maps = [
            level if level.shape[-2:] == size else F.interpolate(level, size=size, mode="bilinear", align_corners=False)
            for level in self.levels
        ]
        return maps[0] if len(maps) == 1 else torch.cat(maps, dim=1)
