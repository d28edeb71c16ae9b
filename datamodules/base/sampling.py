"""Which picture comes when: orders that are functions of (seed, step), and their split over ranks.

All batch samplers give lists of keys (pass number, index): the data set draws its random crops from the key, so a
picture gets the same crop in any worker, on any rank and after any resume.
"""

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from common import chance, machine
from common.errors import ConfigError

Key = tuple[int, int]
"""(epoch or pass number, index in the data set)."""

SMALL = 64
"""Passes of fewer pictures are read in the main process: starting workers would take longer."""
MOST_WORKERS = 8


class TrainBatches:
    """Batches of training keys by position: the batch of step s of a run depends on (seed, s) alone.

    The order of epoch e is the permutation keyed by (seed, "order", e); step s takes the global batch number
    s % steps_per_epoch of epoch s // steps_per_epoch, and each rank the contiguous slice of its number. The rest of an
    epoch that fills no global batch is dropped.

    `start` is asked for the number of steps done whenever an iteration begins, and one iteration always offers
    `steps_per_epoch` batches from there, over the end of the epoch where it began inside one. That is what Lightning
    2.6 needs: it restores its batch counter on a resume, takes only the batches that are left of the interrupted epoch,
    skips none, and begins a new iteration for the next epoch; the length stays the same throughout.
    """

    def __init__(
        self,
        length: int,
        steps_per_epoch: int,
        batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        start: Callable[[], int],
    ) -> None:
        self.length = length
        self.steps_per_epoch = steps_per_epoch
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.seed = seed
        self.start = start

    def __len__(self) -> int:
        return self.steps_per_epoch

    def __iter__(self) -> Iterator[list[Key]]:
        first = self.start()
        local = self.batch_size // self.world_size
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(first, first + self.steps_per_epoch):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order = permutation(self.length, self.seed, "order", epoch)
            begin = step % self.steps_per_epoch * self.batch_size + self.rank * local
            yield [(epoch, int(i)) for i in order[begin : begin + local]]


class FixedBatches:
    """A list of keys in batches of `batch_size`, the last one shorter."""

    def __init__(self, keys: Sequence[Key], batch_size: int) -> None:
        self.keys = keys
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.keys) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for begin in range(0, len(self.keys), self.batch_size):
            yield list(self.keys[begin : begin + self.batch_size])


def permutation(length: int, seed: int, purpose: str, number: int) -> np.ndarray:
    """int64 [length]: the keyed order of one pass."""
    return chance.numpy_generator(seed, purpose, number).permutation(length)


def pass_keys(length: int, order: str, limit: int | None, repeat: bool, seed: int, purpose: str) -> list[Key]:
    """Keys of an offline pass over `length` items, see `SegmentationDataModule.loader`."""
    if order not in ("sequential", "shuffled"):
        raise ValueError(f"order={order!r}: 'sequential' or 'shuffled'")
    if repeat and limit is None:
        raise ValueError("repeat=True needs a limit: the number of pictures of the whole pass")
    wanted = length if limit is None else limit if repeat else min(limit, length)
    keys: list[Key] = []
    while length and len(keys) < wanted:
        number = len(keys) // length
        shuffled = order == "shuffled"
        indices = permutation(length, seed, f"{purpose}.order", number) if shuffled else np.arange(length)
        keys += [(number, int(i)) for i in indices[: wanted - len(keys)]]
    return keys


def stride(length: int, rank: int, world_size: int) -> range:
    """Indices rank, rank + world_size, …: every index on exactly one rank, none twice."""
    return range(rank, length, world_size)


def contiguous(keys: Sequence[Key], rank: int, world_size: int) -> Sequence[Key]:
    """The rank-th of `world_size` consecutive parts, whose lengths differ by one at most."""
    return keys[len(keys) * rank // world_size : len(keys) * (rank + 1) // world_size]


def worker_count(requested: int, items: int, processes: int = 1) -> int:
    """Worker processes of one loader that reads `items` pictures; `requested` is data.workers.

    -1 chooses: none for passes of fewer than 64 pictures; else one less than the cores that each of the `processes`
    training processes of this machine has (the last core computes), at least one and at most eight. On two cores one
    worker reads while the other core, and both between reads, compute.
    """
    if requested >= 0:
        return requested
    if requested != -1:
        raise ConfigError(f"data.workers={requested}: must be 0 or more worker processes, or -1 to choose by itself")
    if items < SMALL:
        return 0
    cores = machine.cores()
    if cores == 1:
        return 0
    bound_by_slurm = "SLURM_CPUS_PER_TASK" in os.environ
    share = cores if bound_by_slurm else cores // processes
    return min(MOST_WORKERS, max(1, share - 1))
