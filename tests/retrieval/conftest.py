"""Two real processes, started once for all tests of this room; their objects are made inside them."""

import pytest
import torch

from common.errors import ConfigError
from retrieval import kmeans, memory
from tests.support.ranks import on_two_ranks


def bank_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches (rows, their numbers) for a bank of 10, long enough to wrap, one longer than the bank."""
    rows = torch.arange(41.0)[:, None] + torch.tensor([0.0, 0.25, 0.5])
    return [(part, part[:, 0].long()) for part in rows.split([7, 8, 1, 25])]


def pool_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Global batches (maps [4,C,3,2], positions [4]) for a reference pool."""
    draw = torch.Generator().manual_seed(3)
    maps = [torch.randn(4, 5, 3, 2, generator=draw) for _ in range(3)]
    return [(m, memory.random_positions(0, "test", step, 4, 6)) for step, m in enumerate(maps)]


def feed(rank: int | None) -> dict[str, torch.Tensor]:
    """The state after all batches: rank 0 takes the first third of each (rounded down), rank 1 the rest, None all."""

    def own(tensor: torch.Tensor) -> torch.Tensor:
        cut = len(tensor) // 3
        return tensor if rank is None else (tensor[:cut] if rank == 0 else tensor[cut:])

    bank = memory.MemoryBank(10, 3, {"number": ((), torch.int64), "odd": ((2,), torch.bool)})
    positions = []
    for rows, numbers in bank_batches():
        odd = torch.stack([numbers % 2 == 1, numbers % 2 == 0], dim=1)
        positions.append(bank.enqueue(own(rows), number=own(numbers), odd=own(odd)))
    pool = memory.ReferencePool(8, 5, 2)
    for maps, places in pool_batches():
        pool.observe(own(maps), own(places))
    pool.fill_agnostic(pool.kept_rows())
    pool.refill(lambda rows: rows[:, :2] * 3)
    state = {f"bank.{name}": value for name, value in bank.state_dict().items()}
    state |= {f"pool.{name}": value for name, value in pool.state_dict().items()}
    return state | {"positions": torch.cat(positions)}


def work(rank: int) -> dict:
    points = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    own = points[:35] if rank == 0 else points[35:]
    result = kmeans.fit_distributed(own, 3, seed=2)
    found = {name: getattr(result, name) for name in ("centroids", "counts", "objective", "dead", "skipped")}
    try:
        kmeans.fit_distributed(own[:1], 3)  # fails on rank 0, which alone fits
    except ConfigError as error:
        found["error"] = str(error)
    return {**found, "state": feed(rank)}


@pytest.fixture(scope="session")
def two_ranks() -> list[dict]:
    """What each of the two processes found."""
    return on_two_ranks(work)
