"""Prototypes that gather the pixels of a picture into slots, and the networks before and behind them.

K prototypes are shared by the whole data set. A pixel is softly given to the prototypes that it resembles, and the mean
of a picture's pixels under the shares of a prototype is that prototype's slot of this picture. Source: SlotCon (NeurIPS
2022), section 3.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from common import distributed
from common.errors import one_of
from common.precision import exact, real

NORMS = ("batch", "layer")
SHORTEST = 1e-12
"""Length up to which a vector has no direction: it is zero, and so is its gradient."""


@dataclass(frozen=True)
class Slots:
    """What prototypes make of a batch of maps."""

    vectors: Tensor
    """[B,K,D]: means of the maps under the shares of each prototype."""
    scores: Tensor
    """[B,K,h,w]: cosines of pixels and prototypes."""


def unit(values: Tensor, dim: int) -> Tensor:
    """Vectors along `dim` at length 1; those without a direction are zero."""
    length = torch.linalg.vector_norm(values, dim=dim, keepdim=True)
    return torch.where(length > SHORTEST, values / length.clamp(min=SHORTEST), torch.zeros_like(values))


def cosines(maps: Tensor, prototypes: Tensor) -> Tensor:
    """[B,K,h,w] of maps [B,D,h,w] and prototypes [K,D], float32 (float64 for float64 maps)."""
    with exact(maps.device):
        found = unit(real(prototypes), 1).to(real(maps).dtype) @ unit(real(maps), 1).flatten(2)
    return found.unflatten(2, maps.shape[-2:])


def group(maps: Tensor, prototypes: Tensor, temperature: float, floor: float = 1e-6) -> Slots:
    """Maps [B,D,h,w] into the slots of prototypes [K,D]; float32 (float64 for float64 maps).

    Shares of a pixel are the softmax of its cosines over the temperature, each raised by `floor`, so that a prototype
    that owns nothing has (nearly) the mean of the picture. They are normalised over the pixels; the vectors that are
    averaged are the maps' own, whatever their lengths.
    """
    scores = cosines(maps, prototypes)
    with exact(maps.device):
        shares = (scores / temperature).softmax(dim=1).flatten(2) + floor
        shares = shares / shares.sum(dim=2, keepdim=True)
        return Slots(shares @ real(maps).flatten(2).mT, scores)


def winners(scores: Tensor) -> Tensor:
    """Pixels that each prototype wins in each picture, float32 [B,K]; scores [B,K,h,w]. Of equals the first wins."""
    ids = scores.detach().argmax(1).flatten(1)
    return torch.zeros(scores.shape[:2], device=scores.device).scatter_add_(
        1, ids, torch.ones_like(ids, dtype=torch.float)
    )


def picture_scores(scores: Tensor, floor: float = 1e-6) -> Tensor:
    """How well each picture shows each prototype, [B,K]: the mean of its cosines [B,K,h,w] over the pixels it wins.

    Every pixel weighs `floor` more, so that a prototype that wins none has its mean over the picture. The pictures of
    highest score show what a prototype stands for. Source: the retrieval of SlotCon (NeurIPS 2022).
    """
    shares = torch.zeros_like(scores).scatter_(1, scores.argmax(1, keepdim=True), 1.0) + floor
    return (shares * scores).sum((2, 3)) / shares.sum((2, 3))


class ProjectionMLP(nn.Sequential):
    """Three linear layers on rows [n,C] -> [n,D], a norm and a GELU behind the first two: the projector (on pixels) and
    the predictor (on slots). norm: batch (as released) or layer (of each row, equal on any number of processes).

    Batch norms take their running statistics in place of a batch of fewer than two rows, which has no variance.
    Raises ConfigError for an unknown norm.
    """

    def __init__(self, in_dim: int, hidden: int, dim: int, norm: str) -> None:
        one_of("method.head.norm", norm, NORMS)
        layer = nn.BatchNorm1d if norm == "batch" else nn.LayerNorm
        wide = [
            nn.Linear(in_dim, hidden),
            layer(hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            layer(hidden),
            nn.GELU(),
        ]
        super().__init__(*wide, nn.Linear(hidden, dim))
        for part in self:
            if isinstance(part, nn.Linear):
                nn.init.trunc_normal_(part.weight, std=0.02)
                nn.init.zeros_(part.bias)

    def forward(self, rows: Tensor) -> Tensor:
        for part in self:
            rows = running(part, rows) if isinstance(part, _BatchNorm) and self._few(part, rows) else part(rows)
        return rows

    def _few(self, norm: _BatchNorm, rows: Tensor) -> bool:
        if not norm.training:
            return False
        if not isinstance(norm, SyncBatchNorm):
            return len(rows) < 2
        return int(distributed.total(torch.tensor(float(len(rows)), device=rows.device))) < 2


def running(norm: _BatchNorm, rows: Tensor) -> Tensor:
    """A batch norm by its running statistics, whatever mode it is in."""
    return F.batch_norm(rows, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


class PrototypeHead(nn.Module):
    """Projector of C channels to D and K prototypes of length D, drawn from N(0, 1)."""

    def __init__(self, in_dim: int, hidden: int, dim: int, prototypes: int, norm: str) -> None:
        super().__init__()
        self.projector = ProjectionMLP(in_dim, hidden, dim, norm)
        self.prototypes = nn.Parameter(torch.randn(prototypes, dim))

    def forward(self, maps: Tensor) -> Tensor:
        """Maps [B,C,h,w] -> [B,D,h,w], not normalised."""
        rows = self.projector(maps.permute(0, 2, 3, 1).flatten(0, 2))
        return rows.unflatten(0, (len(maps), *maps.shape[-2:])).permute(0, 3, 1, 2)
