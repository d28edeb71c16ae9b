"""The head that looks at two patches: what is said of a pair."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads import drop_channels
from models.pixel_heads import conv_block


class PairHead(nn.Module):
    """Logits of pairs of patches: a 3x3 convolution that both share, then two linear layers on both side by side.

    Source: the baselines of IIC (ICCV 2019). There every cell of a patch goes into the first linear layer, which has
    254 million weights for patches of 11 x 11; here it is averaged to `cells` x `cells` first.

    Args:
        dim: C of the patches.
        channels: of the convolution.
        hidden: width between the linear layers.
        outputs: logits of a pair.
        side: cells a side of a patch.
        cells: cells a side that it is averaged to; None: none is averaged, as released.
        norm: batch | group | none, behind the convolution.
    """

    def __init__(self, dim: int, channels: int, hidden: int, outputs: int, side: int, cells: int | None, norm: str):
        super().__init__()
        self.block = nn.Sequential(*conv_block(dim, channels, 3, norm))
        self.cells = None if cells is None else min(cells, side)
        self.first = nn.Linear(2 * channels * (self.cells or side) ** 2, hidden)
        self.last = nn.Linear(hidden, outputs)

    def forward(self, one: Tensor, other: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,C,n,n] twice -> [B,outputs]. mask [B,hidden]: of dropout, see `models.heads.channel_masks`."""
        both = self.block(torch.cat([one, other]))
        if self.cells is not None:
            both = F.adaptive_avg_pool2d(both, self.cells)
        rows = torch.cat(both.flatten(1).chunk(2), dim=1)
        return self.last(drop_channels(F.relu(self.first(rows)), mask))
