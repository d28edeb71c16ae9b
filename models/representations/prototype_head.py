"""The head of Leopart (CVPR 2022): codes on a sphere, and prototypes that they are compared with."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.precision import exact, real


class PrototypeHead(nn.Module):
    """Rows [n,C] -> unit codes [n,D] and their logits [n,K] by K prototypes, both float32.

    Three linear layers with GELU between them and no normalisation; then the product with the prototypes [K,D], which
    has no bias. It is a cosine where `normalise` was called since they last moved: their lengths are taken away in
    place, at the beginning of a step, and not as a part of the function.
    """

    def __init__(self, in_dim: int, hidden: int, dim: int, prototypes: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, dim)
        )
        self.prototypes = nn.Parameter(torch.empty(prototypes, dim))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Draws all weights anew from torch's own stream."""
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.prototypes, std=0.02)

    @torch.no_grad()
    def normalise(self) -> None:
        """Gives every prototype length 1, in place."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        codes = F.normalize(real(self.mlp(rows)), dim=1)
        return codes, self.compare(codes)

    def compare(self, codes: Tensor) -> Tensor:
        """Logits [n,K] of unit codes [n,D]."""
        with exact(codes.device):
            return real(codes) @ self.prototypes.to(real(codes).dtype).T
