"""Shifts of a similarity that no recipe gives: the mean, over all steps so far, of a quantile of the similarity."""

import torch
from torch import Tensor

from common import distributed
from lightning_modules.base import UnsupervisedSegmenter
from losses.correspondence import quantile


class QuantileShifts(UnsupervisedSegmenter):
    """A part of a method whose terms `method.terms.<kind>` have a `shift`, or where that is null a `quantile`."""

    def build_shifts(self) -> None:
        """The sums that the means are made of, in the checkpoint; once, in `build`."""
        kinds = len(self.cfg.method.terms)
        self.register_buffer("shift_sums", torch.zeros(kinds, dtype=torch.float64))
        self.register_buffer("shift_steps", torch.zeros(kinds, dtype=torch.int64))

    @torch.no_grad()
    def shift_of(self, kind: str, signals: list[Tensor]) -> Tensor:
        """Takes the similarities [B,...] of a step and gives the shift of a kind, a scalar; a collective."""
        row = list(self.cfg.method.terms).index(kind)
        found = distributed.mean(quantile(signals, self.cfg.method.terms[kind].quantile))
        self.shift_sums[row] += found.to(self.shift_sums)
        self.shift_steps[row] += 1
        return (self.shift_sums[row] / self.shift_steps[row]).to(found)

    def shifts_by_quantile(self, shifts: dict[str, Tensor | float]) -> dict[str, Tensor]:
        """For the log: the shifts of kinds that have none of their own, as `shift_<kind>`."""
        terms = self.cfg.method.terms
        return {f"shift_{kind}": torch.as_tensor(b) for kind, b in shifts.items() if terms[kind].shift is None}
