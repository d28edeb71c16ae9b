"""Slot attention (Locatello et al., NeurIPS 2020), as DINOSAUR (Seitzer et al., ICLR 2023) has it.

B pictures, N patches, C channels of features, K slots of S numbers. A patch is shared among slots (softmax), and
each slot moves to the mean of what it got, by a GRU and an MLP; some iterations, gradients through all of them.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.precision import exact, real


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers of these widths with ReLU between them; their biases begin at zero, as in the release."""
    layers: list[nn.Module] = []
    for number, (inside, outside) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] if number else []
        layers.append(nn.Linear(inside, outside))
        nn.init.zeros_(layers[-1].bias)
    return nn.Sequential(*layers)


class InputMLP(nn.Module):
    """Features [B,N,C] -> tokens [B,N,S]: layer norm, a hidden layer of C, ReLU."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.layers = mlp(channels, channels, dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(self.norm(features))


class SoftPosition(nn.Module):
    """Adds to a map [B,C,h,w] a linear function of where a cell is: its distances to the four borders, 0..1.

    For convolutional networks, whose features say little of their place.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dense = nn.Linear(4, channels)

    def forward(self, maps: Tensor) -> Tensor:
        down, along = (torch.linspace(0, 1, side, device=maps.device) for side in maps.shape[-2:])
        grid = torch.stack(torch.meshgrid(down, along, indexing="ij"), dim=2)
        return maps + self.dense(torch.cat([grid, 1 - grid], dim=2)).permute(2, 0, 1)


class SlotAttention(nn.Module):
    """Tokens [B,N,F] and slots to begin with [B,K,S] -> slots [B,K,S] and the map [B,K,N] of the last iteration, which
    sums to 1 over the slots.

    eps is added to the map before each slot takes the mean of its tokens; the map that is returned is without it.
    """

    def __init__(self, channels: int, dim: int, iterations: int = 3, eps: float = 1e-8) -> None:
        super().__init__()
        self.iterations, self.eps, self.scale = iterations, eps, dim**-0.5
        self.norm_tokens = nn.LayerNorm(channels)
        self.norm_slots = nn.LayerNorm(dim, bias=False)  # one would shift the logits of all slots alike
        self.to_query = nn.Linear(dim, dim, bias=False)
        self.to_key = nn.Linear(channels, dim, bias=False)
        self.to_value = nn.Linear(channels, dim, bias=False)
        self.gru = nn.GRUCell(dim, dim)
        self.norm_mlp, self.mlp = nn.LayerNorm(dim), mlp(dim, 4 * dim, dim)

    def forward(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.norm_tokens(tokens)
        keys, values = self.to_key(tokens), self.to_value(tokens)
        attention = tokens.new_zeros(0)
        for _ in range(self.iterations):
            slots, attention = self.step(slots, keys, values)
        return slots, attention

    def step(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration with the tokens' keys and values [B,N,S]."""
        queries = self.to_query(self.norm_slots(slots))
        with exact(slots.device):  # which slot a patch belongs to
            attention = (real(queries) @ real(keys).transpose(1, 2) * self.scale).softmax(1)
            shares = attention + self.eps
            updates = shares / shares.sum(2, keepdim=True) @ real(values)
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).unflatten(0, slots.shape[:2])
        return slots + self.mlp(self.norm_mlp(slots)), attention


class SlotStart(nn.Module):
    """Slots to begin with: a mean and a deviation that all slots share, and noise [B,K,S] that tells them apart."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, dim)))
        self.log_deviation = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, 1, dim)))

    def forward(self, noise: Tensor) -> Tensor:
        return self.mean + self.log_deviation.exp() * noise


def mass_means(masks: Tensor, features: Tensor) -> Tensor:
    """The mean feature under each mask: [B,K,N], [B,N,C] -> [B,K,C]; 0 where a mask has no mass."""
    with exact(masks.device):
        masks = real(masks)
        return masks @ real(features) / masks.sum(2, keepdim=True).clamp(min=1e-8)


def slot_vectors(masks: Tensor, features: Tensor) -> Tensor:
    """Unit vectors that stand for slots in a clustering: features summed under the masks, [B,K,N], [B,N,C] -> [B,K,C].

    The sum is not divided by the mass of the mask; the norm takes it away.
    """
    with exact(masks.device):
        return F.normalize(real(masks) @ real(features), dim=2, eps=1e-8)


def empty_slots(masks: Tensor, least: float = 1e-4) -> Tensor:
    """Slots that win no patch, or whose mask is nowhere as high as `least`: [B,K,N] -> bool [B,K]."""
    wins = F.one_hot(masks.argmax(1), masks.shape[1]).sum(1)
    return (wins == 0) | (masks.amax(2) < least)
