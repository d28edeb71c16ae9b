"""Segments of all ranks: prototypes gathered with gradient, so that two processes have the loss of one.

A segment lies in one picture, so it never spans ranks. Every rank makes the prototypes of its own pictures, all ranks
gather them, and each compares its own pixels with all of them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common import distributed
from grouping.segments import prototypes, segment_values


@dataclass(frozen=True)
class GatheredSegments:
    """The segments of a global batch, in one table with an equal number of rows for each rank."""

    prototypes: Tensor
    """[S,D] unit rows, with gradient; zero in rows that are no segment."""
    present: Tensor
    """bool [S], false for rows that are no segment."""
    own: Tensor
    """int64 [n], the row of each pixel of this rank; -1 for pixels that do not count."""
    ids: Tensor
    """int64 [n], the same below the first row of this rank."""
    rows: int
    """Rows of each rank."""
    share: Tensor
    """This rank's part of the global mean over pixels, times the number of ranks: 1 in one process. A mean loss over
    the rank's own pixels times it, averaged over ranks as DDP averages gradients, is the mean over all pixels."""

    reach: distributed.Reach = distributed.EVERYONE
    """The ranks whose segments these are."""

    @property
    def mine(self) -> slice:
        """The rows of this rank."""
        return slice(self.reach.rank() * self.rows, (self.reach.rank() + 1) * self.rows)

    def values(self, values: Tensor) -> Tensor:
        """What the pixels of each segment of all ranks have in common: int64 [n] of this rank -> [S]; -1 without."""
        return self.reach.gather(segment_values(values, self.ids, self.rows))


def gather_segments(
    pixels: Tensor, ids: Tensor, counts: Tensor, reach: distributed.Reach = distributed.EVERYONE
) -> GatheredSegments:
    """The segments of all ranks that are reached. A collective; waits for the device once, for the number of segments.

    pixels: [n,D] unit rows of this rank, gradient reaches them, also from the losses of other ranks. ids: int64 [n],
    dense over the rank's pictures, -1 for pixels that do not count (`Segments.ids`). counts: int64 [B], segments of
    each picture.
    """
    own = counts.sum().reshape(1)
    if reach.ranks() > 1:
        numbers = reach.gather(own)
        rows = max(1, int(numbers.max()))
    else:
        numbers, rows = own, max(1, int(own))
    table = reach.gather(prototypes(pixels, ids, rows), grad=True)
    present = (torch.arange(rows, device=ids.device) < numbers[:, None]).flatten()
    counted = (ids >= 0).sum()
    share = counted * distributed.world_size() / distributed.total(counted).clamp(min=1)
    return GatheredSegments(table, present, ids.where(ids < 0, ids + reach.rank() * rows), ids, rows, share, reach)
