"""The settings of one call of the contrastive loss, and what an anchor's positives weigh."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BASE_TEMPERATURE = 0.07
"""Constant of the release: the loss is multiplied by temperature / BASE_TEMPERATURE."""

MIN_TEMPERATURE = 0.02
"""Below it exp(1 / temperature) leaves float32; unit rows need no subtraction of a maximum above it."""

VERSIONS = (1, 2, "2-fixed")
DENOMINATORS = ("agnostic", "positives")


@dataclass(frozen=True)
class Plan:
    """The settings of one call; see `ghp_contrastive` for what they mean."""

    kinds: list[tuple[Tensor, Tensor] | None]
    """Rows [N,C] and threshold [N] of TA and of TS; None where off."""
    candidates: Tensor | None
    cells: int
    pictures: range
    temperature: float
    lam: float
    factor: float
    """Of every anchor's weighted mean of log p: -tau / 0.07 over the number of terms."""
    joint: bool
    """Whether both kinds of positives share one mean (version 1)."""
    reweighting: bool
    symmetric: bool
    whole: bool
    """Whether TS positives are in the denominators beside TA positives."""
    guarded: bool
    block_bytes: int | None

    @property
    def present(self) -> list[int]:
        """Numbers of the kinds of positives that are on; the first is always in the denominators."""
        return [number for number, kind in enumerate(self.kinds) if kind is not None]

    @property
    def anchors(self) -> slice:
        """Rows of the anchors."""
        return slice(self.pictures.start * self.cells, self.pictures.stop * self.cells)

    @cached_property
    def candidate_count(self) -> int:
        """Entries of the random pattern of a picture."""
        if self.candidates is None:
            return self.cells * next(len(kind[0]) for kind in self.kinds if kind is not None)
        return int(self.candidates.count_nonzero())

    def shares(
        self, counts: list[Tensor | None], filled: Callable[[], Tensor]
    ) -> tuple[list[Tensor | None], Tensor, Tensor]:
        """What one positive of each kind weighs for each anchor, their sum, and how many anchors a picture keeps.

        counts: positives of TA and of TS, [...,N_p] a picture in the last dimension; filled: gives [...,N_p] bool,
        whether a denominator has any patch. Shares and sum are [...,N_p], the last [...,1].
        """
        ag, sp = counts
        if ag is None:
            share, kept = self._mean(sp, sp > 0)
            shares = [None, share * self.lam]
        elif sp is None:
            share, kept = self._mean(ag, ag > 0)
            shares = [share, None]
        elif self.joint:
            share, kept = self._mean(ag + self.lam * sp, ag > 0)
            shares = [share, share * self.lam]
        else:
            some = (sp > 0) & filled() if self.guarded else sp > 0
            (first, kept), (second, kept_too) = self._mean(ag, ag > 0), self._mean(sp, some)
            shares, kept = [first, second * self.lam], torch.minimum(kept, kept_too)
        mass = sum(counts[number] * shares[number] for number in self.present)
        return shares, mass, kept

    def _mean(self, count: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Factor, 1 / k_i and the mean over kept anchors in one; with reweighting k_i cancels and one sum is left."""
        kept = keep.sum(-1, keepdim=True)
        whole = (count * keep).sum(-1, keepdim=True) if self.reweighting else count * kept
        return torch.where(keep, self.factor / whole, 0.0), kept
