"""Teacher projections of earlier patches, the newest of each concept (CAUSE, 2023).

Whole in the checkpoint in buffers of fixed shape, and the same on all ranks where all are given the same rows.
"""

import torch
from torch import Tensor, nn


class ConceptBank(nn.Module):
    """A ring of the `size` newest rows of each of M concepts.

    Buffers: `storage` [M,size,E] and `added` int64 [M], the rows that a concept has been given so far: the next one
    goes to `added % size`. Rows that were never written are zero and never handed out.
    """

    storage: Tensor
    added: Tensor

    def __init__(self, concepts: int, size: int, dim: int):
        super().__init__()
        if min(concepts, size, dim) < 1:
            raise ValueError(f"concepts={concepts}, size={size}, dim={dim}: a bank needs at least one of each")
        self.size = size
        self.register_buffer("storage", torch.zeros(concepts, size, dim))
        self.register_buffer("added", torch.zeros(concepts, dtype=torch.int64))

    @property
    def counts(self) -> Tensor:
        """Rows held of each concept, int64 [M]."""
        return self.added.clamp(max=self.size)

    @torch.no_grad()
    def enqueue(self, concepts: Tensor, rows: Tensor, order: Tensor) -> None:
        """Half of the rows of each concept, rounded down, in place of the oldest: a concept seen once adds nothing.

        Args:
            concepts: int64 [n].
            rows: [n,E]; kept as they are, without gradient.
            order: a permutation int64 [n]: the rows of a concept are taken in this order, the first half of them.
        """
        order = order[concepts[order].argsort(stable=True)]
        sorted_concepts = concepts[order]
        seen = concepts.bincount(minlength=len(self.added))
        place = torch.arange(len(order), device=order.device) - (seen.cumsum(0) - seen)[sorted_concepts]
        taken = seen // 2
        # Of more rows than there is room for, the last ones would stay: the others are not written at all.
        kept = (place < taken[sorted_concepts]) & (place >= (taken - self.size)[sorted_concepts])
        of, place = sorted_concepts[kept], place[kept]
        at = (self.added[of] + place) % self.size
        self.storage[of, at] = rows.detach()[order[kept]].to(self.storage)
        self.added += taken

    def rows(self) -> tuple[Tensor, Tensor]:
        """Copies of the rows held [n,E], and their concepts int64 [n], ascending; of a concept from the oldest to the
        newest."""
        counts = self.counts
        of = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        place = torch.arange(len(of), device=counts.device) - (counts.cumsum(0) - counts)[of]
        return self.storage[of, ((self.added - counts)[of] + place) % self.size], of
