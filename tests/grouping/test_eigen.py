"""Eigenvectors of graph Laplacians against float64 `eigh` of the whole matrix."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError, LabelfreeError
from grouping import eigen

NODES = 300  # more than what is solved densely


def graphs(count=2, nodes=NODES, seed=0, signed=False):
    """Cosines of points around a few centres; negative ones are 0 unless `signed`."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(count, 6, 16, generator=generator)
    own = torch.randint(6, (count, nodes, 1), generator=generator).expand(-1, -1, 16)
    points = centres.gather(1, own) + 0.7 * torch.randn(count, nodes, 16, generator=generator) + 0.3
    cosines = torch.bmm(F.normalize(points, dim=2), F.normalize(points, dim=2).mT)
    return cosines if signed else cosines.clamp(min=0)


def truth(affinity, normalized=True):
    """All eigenvalues, ascending, and eigenvectors as rows, by float64 `eigh`."""
    weights = affinity.double()
    degree = weights.sum(-1)
    degree = degree.where(degree >= 1e-12, torch.ones_like(degree))
    half = degree.rsqrt() if normalized else torch.ones_like(degree)
    values, vectors = torch.linalg.eigh(half[..., None] * (torch.diag_embed(degree) - weights) * half[..., None, :])
    return values, vectors.mT * half[..., None, :]


def residual(affinity, found, normalized=True):
    """max |(D - W) y - l D y| over all vectors."""
    weights, y = affinity.double(), found.vectors.double()
    degree = weights.sum(-1)
    degree = degree.where(degree >= 1e-12, torch.ones_like(degree))[:, None]
    right = degree * y if normalized else y
    return float((degree * y - torch.bmm(y, weights) - found.values.double()[..., None] * right).abs().max())


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("nodes", [12, NODES])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_equals_the_dense_solution(normalized, nodes, k):
    affinity = graphs(nodes=nodes)
    found = eigen.smallest(affinity, k, normalized=normalized)
    values, vectors = truth(affinity, normalized)
    scale = 1.0 if normalized else float(affinity.sum(2).max())
    assert found.vectors.shape == (2, k, nodes)
    assert found.dense.tolist() == [nodes == 12] * 2
    assert float(found.residuals.max()) <= 1e-5
    torch.testing.assert_close(found.values.double(), values[:, :k], rtol=0, atol=2e-6 * scale)
    cosines = F.cosine_similarity(found.vectors.double(), vectors[:, :k], dim=2).abs()
    assert float(cosines.min()) > 0.9999  # the gaps of these graphs are above 0.01
    degree = affinity.sum(2) if normalized else torch.ones(2, nodes)
    inner = torch.bmm(found.vectors * degree[:, None], found.vectors.mT)
    torch.testing.assert_close(inner, torch.eye(k).expand(2, -1, -1), rtol=0, atol=1e-5)
    assert residual(affinity, found, normalized) < 1e-4 * scale


def test_the_first_vector_is_constant_and_its_value_zero():
    found = eigen.smallest(graphs(), 3)
    assert found.values[:, 0].tolist() == [0.0, 0.0]
    first = found.vectors[:, 0]
    torch.testing.assert_close(first, first[:, :1].expand_as(first), rtol=1e-6, atol=0)
    assert bool((first > 0).all())


def test_float64_graphs_reach_float64():
    affinity = graphs().double()
    found = eigen.smallest(affinity, 4, tolerance=1e-11)
    assert not found.dense.any()
    assert found.values.dtype == torch.float64
    torch.testing.assert_close(found.values, truth(affinity)[0][:, :4], rtol=0, atol=1e-12)


def test_a_graph_is_solved_as_it_is_alone_and_nothing_global_is_drawn():
    affinity = graphs(3)
    state = torch.random.get_rng_state()
    together = eigen.smallest(affinity, 4)
    assert torch.equal(torch.random.get_rng_state(), state)
    for number in range(3):
        alone = eigen.smallest(affinity[number : number + 1], 4)
        torch.testing.assert_close(alone.vectors[0], together.vectors[number], rtol=0, atol=1e-4)


def test_the_order_of_the_nodes_does_not_matter():
    affinity = graphs(1)
    order = torch.randperm(NODES, generator=torch.Generator().manual_seed(3))
    one, other = eigen.smallest(affinity, 4), eigen.smallest(affinity[:, order][:, :, order], 4)
    torch.testing.assert_close(other.vectors, one.vectors[:, :, order], rtol=0, atol=1e-4)


def test_more_vectors_than_a_block_holds_apart_are_found_by_starting_anew():
    generator = torch.Generator().manual_seed(0)
    affinity = torch.rand(1, 500, 500, generator=generator)  # all values but the first lie in one narrow band
    affinity = affinity + affinity.mT
    found = eigen.smallest(affinity, 10)
    assert not found.dense.any()
    torch.testing.assert_close(found.values.double(), truth(affinity)[0][:, :10], rtol=0, atol=1e-5)


def test_a_bound_out_of_reach_is_met_by_the_dense_solver(monkeypatch):
    monkeypatch.setattr(eigen, "_ROUNDS", 1)
    monkeypatch.setattr(eigen, "_BLOCKS", 2)
    affinity = graphs()
    affinity[1] = 1.0  # a graph whose values are all equal needs no second block
    found = eigen.smallest(affinity, 2)
    assert found.dense.tolist() == [True, False]
    torch.testing.assert_close(found.values[0].double(), truth(affinity)[0][0, :2], rtol=0, atol=2e-6)


@pytest.mark.parametrize("nodes", [20, NODES])
def test_equal_weights_everywhere(nodes):
    found = eigen.smallest(torch.ones(2, nodes, nodes), 4)
    torch.testing.assert_close(found.values, torch.tensor([[0.0, 1.0, 1.0, 1.0]] * 2), rtol=0, atol=1e-5)
    assert float(found.residuals.max()) <= 1e-5
    assert bool(found.vectors.isfinite().all())


@pytest.mark.parametrize("nodes", [21, NODES])
def test_parts_without_an_edge_between_them_give_a_zero_each(nodes):
    part = torch.arange(nodes) % 3
    affinity = (part[:, None] == part).float()[None]
    found = eigen.smallest(affinity, 4)
    torch.testing.assert_close(found.values, torch.tensor([[0.0, 0.0, 0.0, 1.0]]), rtol=0, atol=1e-5)
    means = torch.stack([found.vectors[0, :3, part == number].mean(1) for number in range(3)], 1)
    torch.testing.assert_close(means[:, part], found.vectors[0, :3], rtol=0, atol=1e-5)  # constant on each part


@pytest.mark.parametrize("nodes", [20, NODES])
def test_a_node_without_an_edge_has_degree_one(nodes):
    affinity = graphs(1, nodes)
    affinity[:, 5] = affinity[:, :, 5] = 0
    found = eigen.smallest(affinity, 3)
    torch.testing.assert_close(found.values.double(), truth(affinity)[0][:, :3], rtol=0, atol=2e-6)
    assert bool((found.vectors[:, :, 5].abs() < 1e-5).all())
    assert residual(affinity, found) < 1e-4


def test_a_graph_without_any_edge():
    found = eigen.smallest(torch.zeros(1, NODES, NODES), 2)
    torch.testing.assert_close(found.values, torch.ones(1, 2), rtol=0, atol=1e-6)
    assert float(found.residuals.max()) < 1e-6


def test_one_node():
    found = eigen.smallest(torch.ones(2, 1, 1), 1)
    assert found.vectors.tolist() == [[[1.0]], [[1.0]]]
    assert found.values.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("nodes", [20, NODES])
def test_negative_weights_smallest_and_nearest_to_zero(nodes):
    affinity = graphs(2, nodes, signed=True)
    values = truth(affinity)[0]
    found = eigen.smallest(affinity, 4)
    torch.testing.assert_close(found.values.double(), values[:, :4], rtol=0, atol=1e-5)
    affinity = affinity - 0.2 * torch.eye(nodes) * nodes  # moves values below zero
    assert float(truth(affinity)[0].min()) < -1e-3 or float(affinity.sum(2).min()) < 0
    values = truth(affinity)[0]
    near = values.gather(1, values.abs().argsort(1)[:, :4]).sort(1).values
    found = eigen.smallest(affinity, 4, nearest="modulus")
    torch.testing.assert_close(found.values.double(), near, rtol=1e-5, atol=1e-5)


def test_signs():
    vectors = torch.tensor([[-3.0, 1, 1, 1], [3, -1, -1, -1], [-1, -2, -3, -1], [1, 1, 2, -1], [1, -1, 0, 0]])
    peak = [[3.0, -1, -1, -1], [3, -1, -1, -1], [1, 2, 3, 1], [1, 1, 2, -1], [1, -1, 0, 0]]
    assert eigen.oriented(vectors, "peak").tolist() == peak
    minority = [*peak[:3], [-1.0, -1, -2, 1], peak[4]]
    assert eigen.oriented(vectors, "minority").tolist() == minority
    assert torch.equal(eigen.oriented(-vectors[:4], "minority"), eigen.oriented(vectors[:4], "minority"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(value):
    affinity = graphs(3)
    affinity[2, 4, 7] = affinity[2, 7, 4] = value
    with pytest.raises(LabelfreeError) as caught:
        eigen.smallest(affinity, 2)
    assert str(caught.value) == (
        "graph 2: 2 of 300 nodes have weights that are not finite; "
        "look for a picture or a precision that gives features that are not finite"
    )


def test_refused_settings():
    for settings, line in (
        ({"k": 6}, "spectral.k=6: a graph of 5 nodes has 1 to 5 eigenvectors; lower k"),
        ({"k": 0}, "spectral.k=0: a graph of 5 nodes has 1 to 5 eigenvectors; lower k"),
        ({"k": 2, "nearest": "largest"}, "spectral.nearest=largest: not one of smallest, modulus"),
        ({"k": 2, "sign": "plus"}, "spectral.sign=plus: not one of minority, peak"),
        ({"k": 2, "solver": "arpack"}, "spectral.solver=arpack: not one of auto, dense"),
    ):
        with pytest.raises(ConfigError) as caught:
            eigen.smallest(torch.ones(1, 5, 5), **settings)
        assert str(caught.value) == line


@pytest.mark.parametrize("k", [50, 51, 60])
def test_many_vectors_of_a_graph_above_the_dense_size(k):
    """More than a block of a quarter of the nodes may have, next to just as many."""
    points = torch.rand(1, 196, 3, generator=torch.Generator().manual_seed(0))
    affinity = (-torch.cdist(points, points).square() / 0.2).exp()
    found = eigen.smallest(affinity, k, nearest="modulus")
    expected = eigen.smallest(affinity, k, nearest="modulus", solver="dense")
    assert found.vectors.shape == (1, k, 196)
    assert torch.allclose(found.values, expected.values, atol=1e-4)
    assert bool(found.dense.all()) or k == 50
