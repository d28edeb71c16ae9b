"""Thresholds, positives, candidates and the weight of the task-specific positives."""

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from losses.contrastive import lambda_schedule, positive_mask, positives, random_candidates, thresholds
from tests.losses.contrastive.cases import scene


def test_positives_are_symmetric_and_never_the_anchor():
    case = scene()
    mask = positive_mask(case["f"], case["threshold_ag"], slice(0, 36))
    assert mask.any()
    assert torch.equal(mask, mask.T)
    assert not mask.diagonal().any()
    one_way = positive_mask(case["f"], case["threshold_ag"], slice(0, 36), symmetric=False)
    assert torch.equal(mask, one_way | one_way.T)
    assert not torch.equal(mask, one_way)


def test_the_comparison_is_strict():
    rows = torch.eye(3)[[0, 0, 1]]
    at_one = positive_mask(rows, torch.ones(3), slice(0, 3))
    assert not at_one.any()
    below = positive_mask(rows, torch.tensor([0.5, 1.0, 1.0]), slice(0, 3))
    assert below.nonzero().tolist() == [[0, 1], [1, 0]]


def test_the_order_of_the_pool_does_not_matter_and_a_new_entry_adds_no_positive():
    case = scene()
    limit = thresholds(case["f"], case["pool_ag"])
    torch.testing.assert_close(limit, case["threshold_ag"])
    assert torch.equal(thresholds(case["f"], case["pool_ag"].flip(0)), limit)
    larger = thresholds(case["f"], torch.cat([case["pool_ag"], case["s_ema"].new_tensor([[1.0] + [0.0] * 7])]))
    before, after = (positive_mask(case["f"], threshold, slice(0, 36)) for threshold in (limit, larger))
    assert not (after & ~before).any()
    assert after.sum() < before.sum()


def test_threshold_blocks_do_not_matter(monkeypatch):
    case = scene()
    whole = thresholds(case["f"], case["pool_ag"])
    monkeypatch.setitem(positives.BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(positives, "MIN_ANCHORS", 5)
    torch.testing.assert_close(thresholds(case["f"], case["pool_ag"]), whole)


def test_candidates_are_keyed_and_have_their_share():
    first = random_candidates(0, 7, 784, 1568, 0.02)
    assert torch.equal(first, random_candidates(0, 7, 784, 1568, 0.02))
    assert not torch.equal(first, random_candidates(0, 8, 784, 1568, 0.02))
    assert not torch.equal(first, random_candidates(1, 7, 784, 1568, 0.02))
    assert first.double().mean().item() == pytest.approx(0.02, abs=0.001)
    assert random_candidates(0, 7, 4, 8, 1.0) is None
    assert not random_candidates(0, 7, 4, 8, 0.0).any()


def test_lambda_grows_after_the_warm_up():
    assert [lambda_schedule(step, 2, 6) for step in range(7)] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert np.isclose(lambda_schedule(1001, 1000, 22896), 1 / 21896, rtol=1e-15)


def test_wrong_schedules_and_empty_pools_are_named():
    with pytest.raises(ConfigError) as caught:
        lambda_schedule(11, 10, 10)
    assert str(caught.value) == "lambda schedule: warm-up of 10 steps in a run of 10 steps; the warm-up must be shorter"
    with pytest.raises(ConfigError) as caught:
        thresholds(torch.eye(3), torch.zeros(0, 3))
    assert str(caught.value) == "the reference pool is empty: fill it before the first training step"
