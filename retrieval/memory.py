"""What a method remembers between steps: `MemoryBank`, a FIFO ring, and `ReferencePool`, the pools of Hidden Positives.

Both are whole in the checkpoint and identical on all ranks: fixed-shape persistent buffers, rows gathered over ranks in
rank order before they are written. So DDP's broadcast of rank 0's buffers changes nothing, a search needs no
communication, and two ranks remember what one process with the same global batch would.

Contents are detached and, unless told otherwise, float32. Both hand out views of their buffers where they can; writing
while a graph still needs such a view makes autograd raise: write after the backward pass.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from common import chance, distributed

REFILL_ROWS = 4096
"""Kept features that one call of the head sees while a pool is refilled."""


class MemoryBank(nn.Module):
    """A ring of the `size` newest rows, with optional extras (labels, ids) of their own shape and type beside each row.

    Buffers: `storage` [M,D], `extra_<name>` [M,...], `pointer` (where the next row goes) and `filled` (rows held), both
    int64 scalars. Rows that were never written are zero and never handed out.
    """

    storage: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        extras: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if size < 1 or dim < 1:
            raise ValueError(f"size={size}, dim={dim}: a bank needs at least one row of at least one number")
        self.size, self.dim = size, dim
        self.names = tuple(extras or ())
        self.register_buffer("storage", torch.zeros(size, dim, dtype=dtype))
        for name, (shape, kind) in (extras or {}).items():
            self.register_buffer(f"extra_{name}", torch.zeros(size, *shape, dtype=kind))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, rows: Tensor, **extras: Tensor) -> Tensor:
        """Gathers `rows` [n,D] and every extra [n,...] over ranks in rank order and writes them over the oldest rows.

        n may differ between ranks and be 0; all ranks must call. Of a batch longer than the bank the last M rows stay.
        Returns the positions written, int64 [min(n over all ranks, M)], of the last rows of the gathered batch.
        Raises ValueError for a wrong shape, and where the extras are not those of the constructor.
        """
        if rows.dim() != 2 or rows.shape[1] != self.dim:
            raise ValueError(f"rows have shape {tuple(rows.shape)}: this bank takes [n, {self.dim}]")
        if set(extras) != set(self.names):
            raise ValueError(f"extras given: {sorted(extras)}; this bank takes: {sorted(self.names)}")
        for name, values in extras.items():
            wanted = (len(rows), *self._table(name).shape[1:])
            if tuple(values.shape) != wanted:
                raise ValueError(f"extra {name} has shape {tuple(values.shape)}: must be {wanted}")
        incoming = {"": rows, **extras}
        positions = self.pointer.new_empty(0)
        for name, values in incoming.items():
            table = self._table(name)
            values = distributed.gather_uneven(values.to(device=table.device, dtype=table.dtype))
            count = len(values)
            positions = self._positions(count)
            table[positions] = values[count - len(positions) :]
        self.pointer.add_(count).remainder_(self.size)
        self.filled.add_(count).clamp_(max=self.size)
        return positions

    def _positions(self, count: int) -> Tensor:
        """Where the last min(count, M) of `count` new rows go; on the device, so nothing waits for it."""
        first = max(0, count - self.size)
        return (torch.arange(first, count, device=self.pointer.device) + self.pointer).remainder(self.size)

    def _table(self, name: str) -> Tensor:
        return self.storage if not name else getattr(self, f"extra_{name}")

    def rows(self, name: str = "") -> Tensor:
        """The filled rows (or the extra `name`) in storage order, a view: the same row stays at the same place."""
        return self._table(name)[: int(self.filled)]

    def ordered(self, name: str = "") -> Tensor:
        """The filled rows (or the extra `name`) from the oldest to the newest, a copy."""
        held = self.rows(name)
        return held.roll(-int(self.pointer), dims=0) if len(held) == self.size else held.clone()

    def reset(self) -> None:
        """Forgets everything."""
        for buffer in self.buffers():
            buffer.zero_()


class ReferencePool(nn.Module):
    """The reference pools of Hidden Positives (CVPR 2023), refilled without a pass of the backbone.

    `agnostic` [M,C]: normalised frozen features, filled once. `kept`: a ring of the frozen features of one random patch
    of each of the M most recently seen pictures, as they came from the backbone. `specific` [M,D]: the normalised codes
    that the momentum head gives to the kept features, renewed by `refill`. The release runs M new pictures through the
    backbone at each renewal instead (make_reference_pool.py); `pool_from_maps` is that way.
    Only filled rows are handed out: a pool that is not full never compares with zeros. `half` rounds the pools to
    float16 before and while they are normalised, as released.
    """

    agnostic: Tensor
    agnostic_filled: Tensor
    specific: Tensor
    specific_filled: Tensor

    def __init__(self, size: int, feature_dim: int, code_dim: int, half: bool = False):
        super().__init__()
        self.size, self.half = size, half
        self.kept = MemoryBank(size, feature_dim)
        self.register_buffer("agnostic", torch.zeros(size, feature_dim))
        self.register_buffer("agnostic_filled", torch.zeros((), dtype=torch.int64))
        self.register_buffer("specific", torch.zeros(size, code_dim))
        self.register_buffer("specific_filled", torch.zeros((), dtype=torch.int64))

    def observe(self, features: Tensor, positions: Tensor) -> Tensor:
        """Keeps one patch of each picture: features [B,C,h,w], positions int64 [B] of this rank, gathered over ranks.

        Returns the places in the ring, as `MemoryBank.enqueue`. All ranks must call.
        """
        return self.kept.enqueue(collect(features, positions))

    def kept_rows(self) -> Tensor:
        """The kept features [m,C], m <= M, not normalised; row i is what `specific` row i was made from."""
        return self.kept.rows()

    @torch.no_grad()
    def fill_agnostic(self, rows: Tensor) -> None:
        """Replaces the task-agnostic pool by `rows` [m,C], normalised here; of more than M rows the first M are taken.

        No collective: the rows must be the same on all ranks (`kept_rows()` are; others are to be gathered before).
        """
        self._write(self.agnostic, self.agnostic_filled, rows[: self.size])

    @torch.no_grad()
    def refill(self, head: Callable[[Tensor], Tensor]) -> None:
        """Replaces the task-specific pool by the codes of all kept features: `head` maps [m,C] to [m,D], in blocks.

        Codes are normalised here, in float32. The head runs in the mode and under the autocast of the caller.
        """
        blocks = self.kept_rows().split(REFILL_ROWS)
        codes = [head(block).float() for block in blocks if len(block)]
        self._write(self.specific, self.specific_filled, torch.cat(codes) if codes else self.specific[:0])

    def fill_specific(self, rows: Tensor) -> None:
        """Replaces the task-specific pool by codes [m,D] made elsewhere (the release's way). As `fill_agnostic`."""
        self._write(self.specific, self.specific_filled, rows[: self.size])

    def agnostic_rows(self) -> Tensor:
        """The filled rows of the task-agnostic pool, [m,C], unit length, a view."""
        return self.agnostic[: int(self.agnostic_filled)]

    def specific_rows(self) -> Tensor:
        """The filled rows of the task-specific pool, [m,D], unit length, a view."""
        return self.specific[: int(self.specific_filled)]

    @torch.no_grad()
    def _write(self, table: Tensor, filled: Tensor, rows: Tensor) -> None:
        if rows.dim() != 2 or rows.shape[1] != table.shape[1]:
            raise ValueError(f"rows have shape {tuple(rows.shape)}: this pool takes [m, {table.shape[1]}]")
        table.zero_()
        table[: len(rows)] = unit_rows(rows.detach(), self.half).float()
        filled.fill_(len(rows))


def random_positions(seed: int, purpose: str, step: int, count: int, cells: int) -> Tensor:
    """A flat patch position in 0..cells-1 for each of `count` pictures: int64 [count] on the CPU, keyed.

    Draw for the global batch and take this rank's part (`common.distributed.own_slice`).
    """
    return torch.randint(cells, (count,), generator=chance.generator(seed, purpose, step))


@torch.no_grad()
def collect(maps: Tensor, positions: Tensor) -> Tensor:
    """The vector of each map [B,C,h,w] at its flat position (int64 [B], row by row): [B,C], detached."""
    batch, _, height, width = maps.shape
    limit = height * width
    if positions.shape != (batch,):
        raise ValueError(f"positions have shape {tuple(positions.shape)}: must be ({batch},), one a picture")
    if batch and (positions.min() < 0 or positions.max() >= limit):
        raise ValueError(
            f"positions reach from {int(positions.min())} to {int(positions.max())}: must be in 0..{limit - 1}"
        )
    at = positions.to(maps.device)
    return maps.detach().permute(0, 2, 3, 1)[torch.arange(batch, device=maps.device), at // width, at % width]


def pool_from_maps(maps: Tensor, positions: Tensor, size: int, half: bool = True) -> Tensor:
    """A pool built as released, from the network's maps [T,B,C,h,w] of T loader batches: [rows,C], unit length.

    positions int64 [rows or more]: the flat patch drawn for each picture, in loader order. As many batches are used as
    it takes to fill `size` rows. `half` casts to float16 and normalises in float16, as the release (the result is
    float16). Only filled rows come back: where the loader is shorter than the pool, the release keeps zero rows, which
    its normalisation turns into NaN; where `size` is no multiple of B, it fails, here the last batch is used in part.
    """
    batches, batch = maps.shape[:2]
    rows = min(batches * batch, size)
    if positions.dim() != 1 or len(positions) < rows:
        raise ValueError(f"positions have shape {tuple(positions.shape)}: {rows} rows need one each")
    pool = collect(maps.flatten(0, 1)[:rows], positions[:rows])
    return unit_rows(pool, half)


def unit_rows(rows: Tensor, half: bool = False) -> Tensor:
    """Rows [n,C] at unit length: float32, or cast to float16 and normalised there (the release)."""
    rows = rows.half() if half else rows.float()
    lengths = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_(min=torch.finfo(rows.dtype).tiny)
