"""Orders and their split over ranks."""

import itertools
import os

import pytest

from common.errors import ConfigError
from datamodules.base import sampling


def batches(start=0, rank=0, world=1, seed=5, length=22, size=4):
    order = sampling.TrainBatches(length, length // size, size, rank, world, seed, lambda: start)
    return list(order)


def test_an_epoch_takes_each_index_at_most_once_and_epochs_differ():
    first, second = batches(0), batches(5)
    for epoch, given in enumerate((first, second)):
        indices = [i for batch in given for _, i in batch]
        assert len(indices) == len(set(indices)) == 20
        assert {number for batch in given for number, _ in batch} == {epoch}
    assert [i for b in first for _, i in b] != [i for b in second for _, i in b]
    assert batches(0, seed=6) != first


def test_the_batch_of_a_step_does_not_depend_on_where_the_run_started():
    straight = batches(0) + batches(5) + batches(10)
    for start in range(10):
        assert batches(start) == straight[start : start + 5]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_take_contiguous_slices_of_the_global_batch(world):
    parts = [batches(3, rank, world) for rank in range(world)]
    assert [list(itertools.chain(*pieces)) for pieces in zip(*parts, strict=True)] == batches(3)


@pytest.mark.parametrize(("length", "world"), [(5, 2), (7, 3), (2, 4), (0, 2)])
def test_evaluation_gives_every_index_to_exactly_one_rank(length, world):
    indices = [i for rank in range(world) for i in sampling.stride(length, rank, world)]
    assert sorted(indices) == list(range(length))


def test_offline_pass_sequential_limited_and_repeated():
    assert sampling.pass_keys(4, "sequential", None, False, 0, "x") == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert sampling.pass_keys(4, "sequential", 9, False, 0, "x") == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert sampling.pass_keys(3, "sequential", 5, True, 0, "x") == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    assert sampling.pass_keys(0, "shuffled", 5, True, 0, "x") == []
    with pytest.raises(ValueError, match="needs a limit"):
        sampling.pass_keys(3, "sequential", None, True, 0, "x")


def test_offline_pass_shuffled_is_keyed_by_purpose_and_pass():
    keys = sampling.pass_keys(30, "shuffled", 60, True, 0, "pool")
    assert sorted(i for _, i in keys[:30]) == list(range(30)) == sorted(i for _, i in keys[30:])
    assert [i for _, i in keys[:30]] != [i for _, i in keys[30:]]
    assert keys == sampling.pass_keys(30, "shuffled", 60, True, 0, "pool")
    assert keys != sampling.pass_keys(30, "shuffled", 60, True, 0, "fit")
    assert keys[:7] == sampling.pass_keys(30, "shuffled", 7, False, 0, "pool")


def test_contiguous_parts_join_to_the_whole():
    keys = [(0, i) for i in range(11)]
    parts = [sampling.contiguous(keys, rank, 4) for rank in range(4)]
    assert list(itertools.chain(*parts)) == keys
    assert sorted(map(len, parts)) == [2, 3, 3, 3]


def test_fixed_batches():
    assert list(sampling.FixedBatches([(0, i) for i in range(5)], 2)) == [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]
    assert len(sampling.FixedBatches([], 2)) == 0


@pytest.mark.parametrize(
    ("cores", "processes", "items", "expected"),
    [(2, 1, 1000, 1), (1, 1, 1000, 0), (16, 1, 1000, 8), (16, 4, 1000, 3), (16, 16, 1000, 1), (16, 1, 63, 0)],
)
def test_workers_are_chosen_from_the_cores(monkeypatch, cores, processes, items, expected):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert sampling.worker_count(-1, items, processes) == expected
    assert sampling.worker_count(3, items, processes) == 3


def test_workers_refused():
    with pytest.raises(ConfigError) as error:
        sampling.worker_count(-2, 100)
    assert str(error.value) == "data.workers=-2: must be 0 or more worker processes, or -1 to choose by itself"
