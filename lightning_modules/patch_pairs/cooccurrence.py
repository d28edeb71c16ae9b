"""Co-occurrence (Isola et al., 2015), as IIC ran it: whether two patches lie side by side.

The network learns what tends to be near what. Code of the baseline: xu-ji/IIC.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.patch_pairs import places
from lightning_modules.patch_pairs.base import PatchPairs

SMALLEST = torch.finfo(torch.float64).eps
"""Probabilities below it cost nothing in the release."""


class CoOccurrence(PatchPairs):
    """The head says how probable it is that the patches are adjacent."""

    title = "co-occurrence"
    outputs = 1

    def draw(self) -> places.Draw:
        return places.draw_adjacency

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Log loss of adjacency, of logits [B,1]."""
        return log_loss(logits[:, 0], targets, self.cfg.method.log_loss)


def log_loss(logits: Tensor, targets: Tensor, of: str = "logits") -> Tensor:
    """-log of the probability of targets (1 or 0), each [B].

    of: `logits`; or `probabilities`, as released: a pair whose probability rounds to nothing costs and teaches nothing.
    Elsewhere both are equal, to the rounding of a probability near one.
    """
    if of == "logits":
        return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    probability = logits.sigmoid()
    probability = torch.where(targets == 1, probability, 1 - probability)
    nothing = probability < SMALLEST
    return -torch.where(nothing, 1.0, probability).log()
