"""Decoders of DINOSAUR (Seitzer et al., ICLR 2023): slots back into the features of all patches.

B pictures, P patches, C feature channels, K slots of S numbers. Each gives the features [B,P,C] and masks [B,K,P] that
sum to 1 over the slots.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import one_of
from common.precision import exact, real
from models.slots.slot_attention import mlp

SHARES = ("said", "attention")
"""How much of a patch a slot of the MLP explains: what the MLP says, as released, or what slot attention took of the
patch. The first needs slots that know their shape, which takes far longer to learn than where a slot lies."""
INITS = ("torch", "he")
"""Weights of the MLP: torch's linear layers, as released, through which the slots' part shrinks; or at the scale that
keeps its size (He et al., ICCV 2015)."""


class MLPDecoder(nn.Module):
    """Each slot by itself, put at every patch with a learned position, says a feature and how much it has to say there.

    The last layer is affine and shares sum to 1, so the mixture is taken before it: equal, and K times cheaper.
    """

    def __init__(
        self, dim: int, channels: int, grid: tuple[int, int], hidden: Sequence[int], shares: str = "said",
        init: str = "torch",
    ) -> None:  # fmt: skip
        """grid: rows and columns of patches; at another grid the positions are interpolated. shares, init: see SHARES
        and INITS. Raises ConfigError for unknown words."""
        super().__init__()
        one_of("method.decoder.mlp.shares", shares, SHARES)
        one_of("method.decoder.mlp.init", init, INITS)
        self.grid, self.said = tuple(grid), shares == "said"
        self.positions = nn.Parameter(torch.randn(1, grid[0] * grid[1], dim) * 0.02)
        self.layers = mlp(dim, *hidden, channels + self.said)
        if init == "he":
            for layer in self.layers[::2]:
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")

    def forward(
        self, slots: Tensor, target: Tensor, grid: tuple[int, int], attention: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """slots [B,K,S]; `target` [B,P,C] is not looked at; grid: rows and columns of the P patches; attention [B,K,P]:
        slot attention's map, which is read where it is the shares."""
        placed = slots.unsqueeze(2) + self.positions_at(grid)
        hidden = self.layers[:-1](placed)
        last = self.layers[-1]
        weight, bias = last.weight, last.bias
        if self.said:
            logits = F.linear(hidden, weight[-1:]).squeeze(3)  # their bias would shift all slots alike
            weight, bias = weight[:-1], bias[:-1]
        with exact(slots.device):
            masks = real(logits).softmax(1) if self.said else real(attention)
            mixed = torch.einsum("bkp,bkpd->bpd", masks, real(hidden))
        return F.linear(mixed, weight, bias), masks

    def positions_at(self, grid: tuple[int, int]) -> Tensor:
        """[1,P,S] at a grid of P patches; at its own grid they stay as they are."""
        maps = self.positions.transpose(1, 2).unflatten(2, self.grid)
        return F.interpolate(maps, size=tuple(grid), mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)


class DecoderLayer(nn.TransformerDecoderLayer):
    """A layer of torch, norms first and without dropout, that also gives how much each token looked at each slot."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True)

    def forward(self, tokens: Tensor, slots: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B,P,C], slots [B,K,C], bool [P,P] of what is hidden -> tokens, shares [B,P,K] (mean of heads)."""
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        found, shares = self.multihead_attn(self.norm2(tokens), slots, slots)
        tokens = tokens + found
        return tokens + self.linear2(F.relu(self.linear1(self.norm3(tokens)))), shares


class TransformerDecoder(nn.Module):
    """Patches in reading order, each told from those before it and from the slots.

    In training and after it every patch sees the true features before it, detached. No positions are added. Masks are
    what the last layer looked at, which no gradient reaches. All layers begin alike, as in the release.
    """

    def __init__(self, dim: int, channels: int, layers: int, heads: int) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(1, 1, channels) * channels**-0.5)
        self.inputs = nn.Sequential(nn.Linear(channels, channels, bias=False), nn.LayerNorm(channels))
        self.memory = nn.Sequential(nn.Linear(dim, channels, bias=False), nn.LayerNorm(channels))
        layer = DecoderLayer(channels, heads)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(layers))

    def forward(
        self, slots: Tensor, target: Tensor, grid: tuple[int, int], attention: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """slots [B,K,S], features [B,P,C] that are told; the rest is not looked at."""
        before = torch.cat([self.first.expand(len(target), -1, -1), target[:, :-1].detach()], dim=1)
        tokens, slots = self.inputs(before), self.memory(slots)
        count = target.shape[1]
        mask = torch.ones(count, count, dtype=torch.bool, device=tokens.device).triu(1)
        shares = tokens.new_zeros(0)
        for layer in self.layers:
            tokens, shares = layer(tokens, slots, mask)
        return tokens, real(shares).transpose(1, 2).detach()
