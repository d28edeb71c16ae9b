"""Clusters that two crops of a picture must agree on where they show the same part of it.

One crop assigns its patches to prototypes; every other crop has to predict the assignments. Source: Leopart (Ziegler
and Asano, CVPR 2022), section 3.1. B pictures, V crops, K prototypes, R cells a side of a cut.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common import distributed
from common.precision import real

SKIPPED = ("leave_out", "count")
"""What a pair of crops without a cell that counts is in the mean over pairs: left out of it, or a 0, as released."""


def inside(masks: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Cells of cut masks [B,V,1,R,R] in 0..1 that lie wholly in them: bool [B,V,R,R].

    Cutting rounds: without a tolerance, as released, some 0.3 % of the cells inside are lost, which ones by chance.
    """
    return real(masks).squeeze(2) >= 1.0 - tolerance


def pair_terms(
    targets: Tensor, logits: Tensor, temperature: float, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross entropy of the cells of V crops with what one crop assigned to them, and how many cells count, both [V].

    targets: probabilities [B,V,K,R,R] of the assigning crop, cut to what it shares with each crop; no gradient.
    logits: [B,V,K,R,R] of each crop, cut to the same part; they are divided by `temperature` here, after the cut.
    kept: bool [B,V,R,R], cells that count; None: all. A term is the mean over such cells of all ranks, times the number
    of ranks, of what this rank has of it (so that the mean over ranks is that of one process); 0 without a cell.
    """
    log_p = F.log_softmax(real(logits) / temperature, dim=2)
    cells = -(real(targets).detach() * log_p).sum(2)
    if kept is None:
        counts = torch.full((cells.shape[1],), float(cells[:, 0].numel()), device=cells.device)
        return cells.mean((0, 2, 3)), counts
    counts = distributed.total(kept.sum((0, 2, 3)).float())
    sums = torch.where(kept, cells, 0.0).sum((0, 2, 3))
    return sums / counts.clamp(min=1) * distributed.world_size(), counts


def mean_of_pairs(terms: Tensor, counts: Tensor, skipped: str = "leave_out") -> Tensor:
    """The mean of terms [n] over the pairs of crops; those without a cell that counts as SKIPPED says."""
    pairs = terms.new_tensor(float(len(terms))) if skipped == "count" else (counts > 0).sum().clamp(min=1)
    return terms.sum() / pairs
