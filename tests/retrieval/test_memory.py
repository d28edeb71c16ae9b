"""The ring against a plain list, checkpoints, two ranks, and the reference pool against the release."""

from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval import memory
from tests.retrieval.conftest import bank_batches, feed

CASE = Path(__file__).parents[1] / "reference" / "cases" / "hidden_positives.reference_pool.0.npz"


def numbered(first: int, count: int) -> torch.Tensor:
    """[count,2] rows that tell which number they are."""
    return torch.arange(first, first + count).float()[:, None] * torch.tensor([1.0, -1.0])


@pytest.mark.parametrize(
    "sizes", [[3], [5], [3, 2], [3, 3], [5, 5, 1], [2, 2, 2, 2], [12], [3, 12], [4, 0, 7, 5], [11, 4]]
)
def test_the_ring_holds_the_newest_rows_of_a_plain_list(sizes):
    bank = memory.MemoryBank(5, 2, {"label": ((), torch.int64)})
    told, first = [], 0
    for size in sizes:
        before, pointer = bank.storage.clone(), int(bank.pointer)
        positions = bank.enqueue(numbered(first, size), label=torch.arange(first, first + size))
        told += list(range(first, first + size))
        first += size
        newest = told[-5:]
        assert bank.ordered()[:, 0].tolist() == newest
        assert bank.ordered("label").tolist() == newest
        assert sorted(bank.rows()[:, 0].tolist()) == newest
        assert int(bank.filled) == len(newest)
        assert int(bank.pointer) == first % 5
        assert positions.tolist() == [(pointer + i) % 5 for i in range(size)][-5:]
        assert bank.storage[positions, 0].tolist() == told[-len(positions) :] if len(positions) else size == 0
        untouched = [i for i in range(5) if i not in positions.tolist()]
        assert torch.equal(bank.storage[untouched], before[untouched])


def test_state_survives_a_round_trip_in_mid_wrap():
    bank = memory.MemoryBank(5, 2, {"label": ((), torch.int64)})
    bank.enqueue(numbered(0, 4), label=torch.arange(4))
    bank.enqueue(numbered(4, 3), label=torch.arange(4, 7))
    other = memory.MemoryBank(5, 2, {"label": ((), torch.int64)})
    other.load_state_dict(bank.state_dict())
    assert set(bank.state_dict()) == {"storage", "extra_label", "pointer", "filled"}
    for one in (bank, other):
        one.enqueue(numbered(7, 2), label=torch.arange(7, 9))
    assert torch.equal(bank.storage, other.storage)
    assert bank.ordered("label").tolist() == other.ordered("label").tolist() == [4, 5, 6, 7, 8]
    shapes = {name: value.shape for name, value in bank.state_dict().items()}
    assert shapes == {
        name: value.shape for name, value in memory.MemoryBank(5, 2, {"label": ((), torch.int64)}).state_dict().items()
    }


def test_rows_are_detached_and_of_the_type_of_the_bank():
    bank = memory.MemoryBank(4, 2)
    rows = torch.ones(2, 2, dtype=torch.bfloat16, requires_grad=True)
    bank.enqueue(rows)
    assert bank.rows().dtype == torch.float32
    assert not bank.rows().requires_grad
    with torch.no_grad():
        rows.zero_()
    assert bank.rows().tolist() == [[1, 1], [1, 1]]
    half = memory.MemoryBank(4, 2, dtype=torch.float16)
    half.enqueue(rows)
    assert half.ordered().dtype == torch.float16


def test_empty_reset_and_copies():
    bank = memory.MemoryBank(3, 2)
    assert bank.rows().shape == bank.ordered().shape == (0, 2)
    bank.enqueue(numbered(1, 3))
    kept = bank.ordered()
    bank.enqueue(numbered(9, 2))
    assert kept[:, 0].tolist() == [1, 2, 3]
    bank.reset()
    assert bank.rows().shape == (0, 2)
    assert int(bank.pointer) == 0


def test_writing_under_a_waiting_graph_is_caught_by_autograd():
    bank = memory.MemoryBank(2, 2)
    bank.enqueue(torch.ones(2, 2))
    codes = torch.ones(3, 2, requires_grad=True)
    loss = (codes @ bank.rows().T).sum()
    bank.enqueue(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda bank: bank.enqueue(torch.zeros(2, 3), a=torch.zeros(2)),
            "rows have shape (2, 3): this bank takes [n, 2]",
        ),
        (lambda bank: bank.enqueue(torch.zeros(2, 2)), "extras given: []; this bank takes: ['a']"),
        (
            lambda bank: bank.enqueue(torch.zeros(2, 2), a=torch.zeros(2), b=torch.zeros(2)),
            "extras given: ['a', 'b']; this bank takes: ['a']",
        ),
        (lambda bank: bank.enqueue(torch.zeros(2, 2), a=torch.zeros(3)), "extra a has shape (3,): must be (2,)"),
        (lambda bank: memory.MemoryBank(0, 2), "size=0, dim=2: a bank needs at least one row of at least one number"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(call, text):
    bank = memory.MemoryBank(4, 2, {"a": ((), torch.float32)})
    with pytest.raises(ValueError) as caught:
        call(bank)
    assert str(caught.value) == text
    assert int(bank.filled) == 0


@pytest.mark.ddp
def test_two_ranks_remember_what_one_process_remembers(two_ranks):
    alone = feed(None)
    numbers = torch.cat([numbers for _, numbers in bank_batches()])
    assert sorted(alone["bank.extra_number"].tolist()) == numbers[-10:].tolist()
    for found in two_ranks:
        assert set(found["state"]) == set(alone)
        for name, value in alone.items():
            assert torch.equal(found["state"][name], value), name


def maps(count: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 6, 3, 2, generator=torch.Generator().manual_seed(seed))


def test_collect_takes_the_flat_position_row_by_row():
    features = maps()
    found = memory.collect(features, torch.tensor([0, 1, 2, 5]))
    wanted = torch.stack([features[0, :, 0, 0], features[1, :, 0, 1], features[2, :, 1, 0], features[3, :, 2, 1]])
    assert torch.equal(found, wanted)
    with pytest.raises(ValueError) as caught:
        memory.collect(features, torch.tensor([0, 1, 2, 6]))
    assert str(caught.value) == "positions reach from 0 to 6: must be in 0..5"
    with pytest.raises(ValueError) as caught:
        memory.collect(features, torch.tensor([0, 1]))
    assert str(caught.value) == "positions have shape (2,): must be (4,), one a picture"


def test_positions_are_keyed_and_cover_all_cells():
    draw = memory.random_positions(3, "hidden_positives/kept", 17, 500, 6)
    assert torch.equal(draw, memory.random_positions(3, "hidden_positives/kept", 17, 500, 6))
    assert draw.unique().tolist() == [0, 1, 2, 3, 4, 5]
    for other in (
        (4, "hidden_positives/kept", 17),
        (3, "hidden_positives/agnostic", 17),
        (3, "hidden_positives/kept", 18),
    ):
        assert not torch.equal(draw, memory.random_positions(*other, 500, 6))


def test_only_filled_rows_of_the_pools_are_handed_out():
    pool = memory.ReferencePool(10, 6, 3)
    assert pool.agnostic_rows().shape == (0, 6)
    assert pool.specific_rows().shape == (0, 3)
    pool.refill(lambda rows: rows[:, :3])
    assert pool.specific_rows().shape == (0, 3)
    features, positions = maps(), torch.tensor([0, 1, 2, 5])
    assert pool.observe(features, positions).tolist() == [0, 1, 2, 3]
    kept = memory.collect(features, positions)
    assert torch.equal(pool.kept_rows(), kept)  # raw: the head is fed what the backbone gave
    pool.fill_agnostic(kept)
    pool.refill(lambda rows: rows[:, :3] * 7)
    torch.testing.assert_close(pool.agnostic_rows(), torch.nn.functional.normalize(kept, dim=1))
    torch.testing.assert_close(pool.specific_rows(), torch.nn.functional.normalize(kept[:, :3], dim=1))


def test_refill_equals_a_pass_of_the_head_and_forgets_the_old_codes(monkeypatch):
    monkeypatch.setattr(memory, "REFILL_ROWS", 3)
    pool = memory.ReferencePool(5, 6, 4)
    head = torch.nn.Linear(6, 4)
    for step in range(3):  # 12 pictures into a ring of 5
        pool.observe(maps(seed=step), memory.random_positions(0, "test", step, 4, 6))
    calls = []
    pool.refill(lambda rows: calls.append(len(rows)) or head(rows))
    assert calls == [3, 2]
    wanted = torch.nn.functional.normalize(head(pool.kept_rows()), dim=1)
    torch.testing.assert_close(pool.specific_rows(), wanted)
    assert not pool.specific_rows().requires_grad
    pool.kept.reset()
    pool.observe(maps()[:2], torch.tensor([1, 2]))
    pool.refill(head)
    assert pool.specific_rows().shape == (2, 4)
    assert pool.specific[2:].abs().max() == 0


def test_the_pool_is_whole_in_the_checkpoint():
    pool = memory.ReferencePool(5, 6, 6)
    for step in range(2):
        pool.observe(maps(seed=step), memory.random_positions(0, "test", step, 4, 6))
    pool.fill_agnostic(pool.kept_rows())
    pool.refill(lambda rows: rows.flip(1))
    other = memory.ReferencePool(5, 6, 6)
    other.load_state_dict(pool.state_dict())
    for one in (pool, other):
        one.observe(maps(seed=9), torch.tensor([0, 1, 2, 3]))
    for name, value in pool.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert torch.equal(other.specific_rows(), pool.specific_rows())
    assert len(other.agnostic_rows()) == 5


def test_codes_made_elsewhere_fill_the_pools():
    pool = memory.ReferencePool(3, 6, 2)
    pool.fill_specific(torch.tensor([[3.0, 4.0], [0.0, 2.0]]).half())
    torch.testing.assert_close(pool.specific_rows(), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    pool.fill_specific(torch.eye(2).repeat(5, 1))
    assert pool.specific_rows().tolist() == [[1, 0], [0, 1], [1, 0]]
    with pytest.raises(ValueError) as caught:
        pool.fill_agnostic(torch.ones(2, 5))
    assert str(caught.value) == "rows have shape (2, 5): this pool takes [m, 6]"


@pytest.mark.skipif(not CASE.is_file(), reason="the recorded case is not here")
@pytest.mark.parametrize("name", ["ag", "sp", "sp_renew"])
def test_a_pool_from_maps_equals_the_release(name):
    case = np.load(CASE)
    source = torch.from_numpy(case["in_f_maps" if name == "ag" else "in_s_maps"])
    size = int(case["cfg_pool_size"])
    pool = memory.pool_from_maps(source, torch.from_numpy(case[f"in_index_{name}"]), size)
    assert pool.dtype == torch.float16
    np.testing.assert_allclose(pool.float().numpy(), case[f"out_pool_{name}"].astype(np.float32), atol=1e-3)
    exact = memory.pool_from_maps(source, torch.from_numpy(case[f"in_index_{name}"]), size, half=False)
    np.testing.assert_allclose(exact.numpy(), case[f"out_pool_{name}"].astype(np.float32), atol=2e-3)
    torch.testing.assert_close(exact.norm(dim=1), torch.ones(size))


def test_a_pool_from_maps_keeps_only_filled_rows_and_never_nan():
    source = torch.randn(2, 3, 4, 2, 5, generator=torch.Generator().manual_seed(0))
    source[0, 1] = 0
    positions = memory.random_positions(0, "test", 0, 6, 10)
    for half in (True, False):
        pool = memory.pool_from_maps(source, positions, 100, half)
        assert pool.shape == (6, 4)
        assert torch.isfinite(pool).all()
        assert pool[1].abs().max() == 0
        assert torch.equal(memory.pool_from_maps(source, positions, 4, half), pool[:4])  # within a batch of 3
    flat = source.flatten(0, 1).flatten(2)
    wanted = torch.stack([flat[i, :, positions[i]] for i in (0, 2, 3, 4, 5)])
    torch.testing.assert_close(pool[[0, 2, 3, 4, 5]], torch.nn.functional.normalize(wanted, dim=1))
    with pytest.raises(ValueError) as caught:
        memory.pool_from_maps(source, positions[:3], 5)
    assert str(caught.value) == "positions have shape (3,): 5 rows need one each"
