"""The graph of neighbouring clusters by hand, and communities that are plain to see."""

import importlib.util

import pytest
import torch

from common.errors import ConfigError
from evaluation.overclustering import graph


def test_neighbours_are_shares_by_picture():
    """One row of pixels: only 0 and 180 degrees have neighbours; 1 lies beside 0 once, beside 2 once; 3 is alone."""
    one, two = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 0, 1, 1]])
    found = graph.cooccurrence([one, two, torch.tensor([[3, 3]])], 5, distances=[1])
    wanted = torch.zeros(5, 5, dtype=torch.float64)
    wanted[0, 1] = 1  # in both pictures
    wanted[1, 0] = (0.5 + 1) / 2
    wanted[1, 2] = 0.5 / 2
    wanted[2, 1] = 1
    assert torch.allclose(found, wanted)


def test_the_release_looks_along_240_degrees_in_place_of_225():
    """At distance 2 that is the pixel two rows up and one to the left, in place of one up and one to the left."""
    ids = torch.arange(6).view(3, 2)
    eight, released = (graph.cooccurrence([ids], 6, distances=[2], angles=name) for name in ("eight", "released"))
    assert eight[5].nonzero().flatten().tolist() == [1, 2]
    assert released[5].nonzero().flatten().tolist() == [0, 1]


def test_ids_beyond_a_byte_are_counted():
    found = graph.cooccurrence([torch.tensor([[0, 700]])], 701, distances=[1])
    assert found[0, 700] == found[700, 0] == 1


def test_an_edge_needs_both_directions():
    matrix = torch.tensor([[0, 0.3, 0.2], [0.1, 0, 0.05], [0.4, 0.5, 0]], dtype=torch.float64)
    assert graph.edges(matrix, 0.1) == [(0, 1, 0.1), (0, 2, 0.2)]


def test_no_edges_no_community():
    assert graph.communities([], 3, algorithm="louvain", time=1, count=2, seed=0).tolist() == [0, 0, 0]


TRIANGLES = [(a, b, 1.0) for a, b in ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5))] + [(2, 3, 0.05)]


def test_two_triangles_are_two_communities_and_one_when_time_is_long():
    settings = {"algorithm": "louvain", "count": 2, "seed": 3}
    assert graph.communities(TRIANGLES, 7, time=1, **settings).tolist() == [1, 1, 1, 2, 2, 2, 0]
    assert graph.communities(TRIANGLES, 7, time=200, **settings).tolist() == [1, 1, 1, 1, 1, 1, 0]


def test_infomap_finds_them_too():
    pytest.importorskip("infomap")
    found = graph.communities(TRIANGLES, 7, algorithm="infomap", time=1, count=2, seed=0)
    assert found.tolist() == [1, 1, 1, 2, 2, 2, 0]


def test_a_missing_infomap_is_one_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        graph.expect_algorithm("infomap", "evaluation.communities.algorithm")
    assert str(caught.value) == (
        "evaluation.communities.algorithm=infomap: the package infomap (GPL) is not installed; `pip install "
        "'labelfree[infomap]'`, or set evaluation.communities.algorithm=louvain"
    )
    graph.expect_algorithm("louvain", "evaluation.communities.algorithm")
