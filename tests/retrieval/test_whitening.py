"""Whitened features: unit vectors of components with equal variance."""

import numpy as np
import pytest
import torch

import config
from common.errors import ConfigError
from engine import setup
from retrieval import whitening
from retrieval.whitening import deviations, principal, scaled, whitened
from tests.conftest import run_small, small_words


def stretched(count: int = 400) -> torch.Tensor:
    """Points [count,6] with very different spreads, turned and moved; the last direction has none."""
    generator = torch.Generator().manual_seed(0)
    spreads = torch.tensor([100.0, 10.0, 3.0, 1.0, 0.1, 0.0])
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    return torch.randn(count, 6, generator=generator) * spreads @ turn + 5


def test_the_first_components_have_unit_variance_and_no_correlation():
    points = stretched()
    mean, axes = principal(points, 4)
    components = (points.double() - mean) @ axes.T.double()
    assert torch.allclose(components.T @ components / len(points), torch.eye(4, dtype=torch.float64), atol=1e-3)
    rows = whitened(points, mean, axes)
    assert torch.allclose(rows.norm(dim=1), torch.ones(len(points)), atol=1e-5)


def test_a_direction_without_variance_adds_nothing():
    points = stretched()
    five, six = (whitened(points, *principal(points, dim)) for dim in (5, 6))
    assert torch.allclose(five @ five.T, six @ six.T, atol=1e-4)
    assert not principal(points[:1], 3)[1].any()


@pytest.mark.train
def test_the_baseline_clusters_whitened_features_and_keeps_the_axes(tmp_path):
    run = run_small("kmeans_baseline", tmp_path, "white", "method.whitening=8", "trainer.max_steps=1")
    assert run.weights["kmeans_probe.centroids"].shape[1] == 8
    assert run.weights["axes"].any()


def test_more_components_than_channels_are_refused():
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", "method.whitening=10000")))
    with pytest.raises(ConfigError, match=r"method\.whitening=10000: the features have 320 channels; set 320 at most"):
        setup.build_model(cfg, data.meta)


def test_numbers_are_divided_by_their_own_deviation_and_rows_by_their_length():
    points = torch.tensor([[1.0, 2.0, 5.0], [3.0, 2.0, -5.0], [5.0, 8.0, 5.0]])
    spread = deviations(points)
    assert torch.allclose(spread.square(), torch.tensor([8 / 3, 8.0, 200 / 9]))
    rows = points / spread
    assert torch.allclose(scaled(points, spread), rows / rows.norm(dim=1, keepdim=True))
    assert deviations(points[:1]).tolist() == [1, 1, 1]  # nothing to divide by


def test_reduction_standardises_and_keeps_the_largest_directions():
    """Against numpy's singular values; a number without any spread does not make NaN."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator) * 5 + 3
    points[:, 4] = 2
    found = whitening.reduction(points, 3)
    reduced = found(points)
    plain = points.numpy() - points.numpy().mean(0)
    deviation = plain.std(0)
    plain /= np.where(deviation > 0, deviation, 1)
    values = np.linalg.svd(plain, compute_uv=False)[:3]
    assert np.linalg.norm(reduced.numpy(), axis=0) == pytest.approx(values, rel=1e-4)
    assert torch.allclose(reduced.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(found.axes @ found.axes.T, torch.eye(3), atol=1e-5)
    assert torch.equal(found(points.view(2, 100, 6)), reduced.view(2, 100, 3))


def test_reduction_without_faiss_is_the_same_up_to_sign(monkeypatch):
    points = torch.randn(100, 5, generator=torch.Generator().manual_seed(1)) * torch.arange(1, 6)
    with_faiss = whitening.reduction(points, 4).axes
    monkeypatch.setattr(whitening.search, "load_faiss", lambda: (None, "not here"))
    assert torch.allclose((whitening.reduction(points, 4).axes * with_faiss).sum(1).abs(), torch.ones(4), atol=1e-4)


def test_reduction_of_few_points_has_few_directions():
    assert whitening.reduction(torch.randn(3, 8), 50).axes.shape == (3, 8)
