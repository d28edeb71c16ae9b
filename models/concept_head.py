"""The transformer head of CAUSE (2023): one decoder layer in which concepts of a book ask the patches of a picture.

Dropout is passed in as masks, as in models/heads.py. B pictures, P = h w patches, D channels, r code.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads import SegmentationHead, drop_channels

PLACES = ("self_attention", "residual1", "cross_attention", "residual2", "hidden", "residual3", "linear", "nonlinear")
"""Where dropout acts: the weights of both attentions [B,P,P], what is added to the queries [B,P,D], the hidden layer
[B,P,F], and the two inputs of the code's head [B,D,h,w]."""
NONE: Mapping[str, Tensor | None] = {}


class Attention(nn.MultiheadAttention):
    """One attention head with weights that can be masked after the softmax."""

    def __init__(self, dim: int):
        super().__init__(dim, 1, batch_first=True)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B,P,D] each; mask [B,P,P] of the weights, None drops nothing."""
        parts = zip((query, key, value), self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3), strict=True)
        q, k, v = (F.linear(part, weight, bias) for part, weight, bias in parts)
        if mask is None:
            found = F.scaled_dot_product_attention(q, k, v)
        else:
            weights = (torch.bmm(q, k.mT) / math.sqrt(q.shape[2])).softmax(2)
            found = torch.bmm(weights * mask.to(weights.dtype), v)
        return self.out_proj(found)


class ConceptTransformer(nn.Module):
    """Queries are the book's vectors of the patches' concepts; they attend to each other, then to the features. What
    comes out is added to the features, and a head as in STEGO makes the code of the sum.

    The queries have learnt positions, a table for maps of one size [h,w]; for others it is resized bicubically.
    """

    def __init__(self, in_dim: int, dim: int, grid: tuple[int, int], hidden: int = 2048):
        super().__init__()
        self.grid = grid
        self.positions = nn.Parameter(torch.randn(grid[0] * grid[1], in_dim))
        self.self_attention, self.cross_attention = Attention(in_dim), Attention(in_dim)
        self.hidden, self.out = nn.Linear(in_dim, hidden), nn.Linear(hidden, in_dim)
        self.norms = nn.ModuleList(nn.LayerNorm(in_dim) for _ in range(3))
        self.head = SegmentationHead(in_dim, dim)

    def forward(self, features: Tensor, queries: Tensor, masks: Mapping[str, Tensor | None] = NONE) -> Tensor:
        """Codes [B,r,h,w] of features [B,D,h,w]; queries [B,P,D], masks by the names of PLACES."""
        first, second, third = self.norms
        patches, positions = features.flatten(2).mT, self.positions_for(features.shape[2:])
        placed = queries + positions
        asked = self.self_attention(placed, placed, queries, masks.get("self_attention"))
        h = first(queries + drop_channels(asked, masks.get("residual1")))
        seen = self.cross_attention(h + positions, patches, patches, masks.get("cross_attention"))
        h = second(h + drop_channels(seen, masks.get("residual2")))
        inner = self.out(drop_channels(F.relu(self.hidden(h)), masks.get("hidden")))
        h = third(h + drop_channels(inner, masks.get("residual3")))
        sums = features + h.mT.unflatten(2, features.shape[2:])
        return self.head(sums, (masks.get("linear"), masks.get("nonlinear")))

    def positions_for(self, grid: tuple[int, int]) -> Tensor:
        """The table of positions for maps of a size, [P,D]."""
        if tuple(grid) == self.grid:
            return self.positions
        table = self.positions.T.unflatten(1, self.grid)[None].float()
        return F.interpolate(table, size=tuple(grid), mode="bicubic", align_corners=False)[0].flatten(1).T
