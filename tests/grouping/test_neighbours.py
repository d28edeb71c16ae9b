"""Spectral clusters of objects: against whole eigenproblems, of graphs that fall apart, and the core by hand."""

import logging

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy import sparse

from common.errors import ConfigError, LabelfreeError
from grouping import neighbours


def groups(count, size, seed=0, spread=0.4, apart=1.0):
    draw = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 6, generator=draw) * apart
    rows = torch.arange(count).repeat_interleave(size)
    return centres[rows] + spread * torch.randn(count * size, 6, generator=draw), rows


def same_partition(one, other):
    return len(torch.stack([one, other]).unique(dim=1).T) == len(one.unique()) == len(other.unique())


def whole(graph, count):
    """The same vectors from the whole generalised problem (D - W) y = l D y."""
    weights = graph.toarray() * (1 - np.eye(graph.shape[0]))
    degree = np.diag(weights.sum(1))
    return scipy.linalg.eigh(degree - weights, degree, subset_by_index=[0, count - 1])


def test_graph_joins_the_nearest_and_counts_both_ways():
    points = torch.tensor([[0.0], [1.0], [2.5], [9.0]])
    graph = neighbours.neighbour_graph(points, 2).toarray()
    wanted = [[1, 1, 0, 0], [1, 1, 0.5, 0], [0, 0.5, 1, 0.5], [0, 0, 0.5, 1]]
    assert graph.tolist() == wanted


def test_far_from_the_origin_the_graph_is_the_same():
    points, _ = groups(3, 20)
    near, far = (neighbours.neighbour_graph(part, 5) for part in (points.double(), points.double() + 1e4))
    assert (near != far).nnz == 0


@pytest.mark.parametrize("dense", [10**6, 0])
def test_both_solvers_give_the_vectors_of_the_whole_problem(dense, monkeypatch):
    monkeypatch.setattr(neighbours, "DENSE", dense)
    graph = neighbours.neighbour_graph(groups(4, 40, spread=0.8)[0], 12)
    found = neighbours.spectral_embedding(graph, 4)
    values, vectors = whole(graph, 5)
    assert found.components == 1
    assert np.allclose(found.values, values, atol=1e-9)
    aligned = vectors[:, :4] * np.sign((vectors[:, :4] * found.maps.numpy()).sum(0))
    assert np.allclose(found.maps, aligned, atol=1e-7)
    peaks = found.maps.gather(0, found.maps.abs().argmax(0, keepdim=True))
    assert bool((peaks > 0).all())
    assert torch.allclose(found.maps[:, 0], found.maps[0, 0])


def test_no_whole_matrix_is_made_of_many_objects(monkeypatch):
    monkeypatch.setattr(neighbours, "DENSE", 20)
    monkeypatch.setattr(scipy.linalg, "eigh", lambda *_, **__: pytest.fail("dense"))
    monkeypatch.setattr(sparse.csr_matrix, "toarray", lambda _: pytest.fail("dense"))
    points, rows = groups(3, 60, apart=3.0)
    found = neighbours.spectral_clusters(neighbours.neighbour_graph(points, 70), 3, core=100, seed=0)
    assert same_partition(found.labels, rows)


def test_graph_that_falls_apart_has_a_constant_vector_a_component(caplog):
    points, rows = groups(3, 15, apart=100.0)
    with caplog.at_level(logging.INFO):
        found = neighbours.spectral_clusters(neighbours.neighbour_graph(points, 5), 3, core=100, seed=0)
    assert "3 components" in caplog.text
    assert found.embedding.components == 3
    assert found.embedding.values[:3].tolist() == [0, 0, 0]
    assert found.embedding.values[3] > 0.01
    assert same_partition(found.labels, rows)


def test_more_components_than_clusters_are_named(caplog):
    points, _ = groups(5, 6, apart=100.0)
    with caplog.at_level(logging.INFO):
        found = neighbours.spectral_embedding(neighbours.neighbour_graph(points, 4), 3)
    assert "5 components, more than the 3 clusters" in caplog.text
    assert int((found.maps == 0).all(1).sum()) == 12


def test_one_object_more_than_coordinates():
    found = neighbours.spectral_embedding(neighbours.neighbour_graph(torch.randn(3, 2), 3), 3)
    assert found.maps.shape == (3, 3)
    assert found.values[3] == float("inf")


def test_core_is_nearer_than_the_percentile_of_its_cluster():
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4, 0.0, 0.5])
    maps = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, 8)[:, None]
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    centres = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    distance, core = neighbours.core_objects(maps, centres, labels, 80)
    assert torch.allclose(distance, 1 - angles.double().cos(), atol=1e-7)
    assert core.tolist() == [True, True, True, True, False, True, False]
    assert neighbours.core_objects(maps, centres, labels, 100)[1].all()


def test_clusters_of_one_seed_are_the_same():
    graph = neighbours.neighbour_graph(groups(4, 30, spread=1.0)[0], 10)
    one, other = (neighbours.spectral_clusters(graph, 4, core=80, seed=1) for _ in range(2))
    assert torch.equal(one.labels, other.labels)
    assert torch.equal(one.core, other.core)


def test_refusals():
    points = torch.randn(5, 2)
    with pytest.raises(ConfigError, match=r"neighbours=9: of 5 objects"):
        neighbours.neighbour_graph(points, 9)
    with pytest.raises(LabelfreeError, match="not finite"):
        neighbours.neighbour_graph(points / 0, 3)
    with pytest.raises(ConfigError, match="num_clusters: 5 objects"):
        neighbours.spectral_embedding(neighbours.neighbour_graph(points, 3), 6)
    with pytest.raises(ConfigError, match="core=0"):
        neighbours.core_objects(points, points[:1], torch.zeros(5, dtype=torch.int64), 0)
