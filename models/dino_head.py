"""The projection head of DINO and iBOT: an MLP to a unit sphere, then prototypes."""

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DinoHead(nn.Module):
    """Logits of K prototypes: MLP with GELU -> L2-normalised bottleneck -> last layer with weight normalisation.

    The last layer is g_k v_k / |v_k| without bias; with `norm_last` g is 1 and not trained, so that logits are cosines.
    The same head serves class tokens and patches (iBOT). The last two operations are float32 under any precision: they
    are divided by temperatures of a few hundredths. Source: DINO (ICCV 2021), appendix C.
    """

    def __init__(
        self, in_dim: int, hidden: int, bottleneck: int, out_dim: int, layers: int = 3, norm_last: bool = True
    ):
        super().__init__()
        widths = [in_dim, *[hidden] * (layers - 1), bottleneck]
        steps: list[nn.Module] = []
        for wide, narrow in itertools.pairwise(widths):
            steps += [nn.Linear(wide, narrow), nn.GELU()]
        self.mlp = nn.Sequential(*steps[:-1])
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.direction = nn.Parameter(torch.randn(out_dim, bottleneck) / bottleneck**0.5)
        self.length = nn.Parameter(torch.ones(out_dim, 1), requires_grad=not norm_last)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows [n,C] -> logits [n,K], float32."""
        hidden = self.mlp(rows)
        with torch.autocast(rows.device.type, enabled=False):
            prototypes = F.normalize(self.direction.float(), dim=1) * self.length.float()
            return F.linear(F.normalize(hidden.float(), dim=1), prototypes)

    def last_layer(self) -> list[nn.Parameter]:
        """Parameters of the last layer; DINO keeps them still in the first epoch."""
        return [self.direction, self.length]
