"""Communities of clusters: those that often lie beside each other belong to one object (Leopart, CVPR 2022).

The graph has a node for each cluster. Its edges come from co-occurrence: how often a cluster is the neighbour of
another, by picture, as a share of all neighbours of the first. Communities are found by

- `louvain`: modularity (Blondel et al. 2008) by networkx, BSD licence; with time t its resolution is 1 / t, which is
  Markov stability at time t (Lambiotte, Delvenne and Barahona 2008), as t is in Infomap;
- `infomap`: the map equation (Rosvall and Bergstrom 2008), two levels, by the package `infomap`, as released. It is
  under the GPL, so it is an extra of its own and imported nowhere else.
"""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError

ALGORITHMS = ("louvain", "infomap")
ANGLES = {
    "eight": (0, 45, 90, 135, 180, 225, 270, 315),
    "released": (0, 45, 90, 135, 180, 240, 270, 315),
}
"""Directions in degrees in which neighbours are looked for: all eight, or as the release writes them, 240 for 225."""


def expect_algorithm(algorithm: str, key: str) -> None:
    """Raises ConfigError where `algorithm`, the value of `key`, needs a package that is missing."""
    if algorithm == "infomap" and importlib.util.find_spec("infomap") is None:
        raise ConfigError(
            f"{key}=infomap: the package infomap (GPL) is not installed; `pip install 'labelfree[infomap]'`, or set "
            f"{key}=louvain"
        )


def cooccurrence(
    clusters: Sequence[Tensor], k: int, distances: Sequence[int] = (1, 2), angles: str = "eight"
) -> Tensor:
    """How often cluster j lies beside cluster i, as a share of all that lies beside i: float64 [K,K].

    clusters: id maps int64 [H,W] with ids 0..K-1, one of each picture. A picture counts its pairs of pixels at each of
    `distances` (px) and `angles` (see ANGLES; offsets are rounded to whole pixels); pairs of one cluster are left out
    and rows divided by their sum. A row is the mean over the pictures in which the cluster has a neighbour.
    """
    from skimage.feature import graycomatrix  # here alone: it takes a while

    radians = np.deg2rad(ANGLES[angles])
    total, shown = np.zeros((k, k)), np.zeros(k)
    for ids in clusters:
        present, own = np.unique(ids.cpu().numpy(), return_inverse=True)
        levels = len(present)
        found = graycomatrix(own.reshape(ids.shape).astype(np.uint16), list(distances), radians, levels=levels)
        pairs = found.sum((2, 3)).astype(np.float64)
        np.fill_diagonal(pairs, 0)
        sums = pairs.sum(1)
        total[np.ix_(present, present)] += pairs / np.maximum(sums, 1)[:, None]
        shown[present] += sums > 0
    return torch.from_numpy(total / np.maximum(shown, 1)[:, None])


def edges(matrix: Tensor, least: float) -> list[tuple[int, int, float]]:
    """(i, j, weight), i <= j, of clusters that are neighbours both ways: both entries of the matrix [K,K] are at least
    `least` (above 0), and the smaller one is the weight."""
    weight = torch.minimum(matrix, matrix.T)
    pairs = ((weight >= least) & (weight > 0)).triu().nonzero().tolist()
    return [(i, j, float(weight[i, j])) for i, j in pairs]


def communities(
    found: Sequence[tuple[int, int, float]], k: int, *, algorithm: str, time: float, count: int, seed: int
) -> Tensor:
    """The community of every cluster from the edges of their graph: int64 [K], 1, 2, ...; 0 of clusters without edges.

    time: the larger, the fewer communities. count: how many Infomap prefers; Louvain takes what comes. seed: 0 and up.
    """
    if not found:
        return torch.zeros(k, dtype=torch.int64)
    groups = _infomap(found, time, count, seed) if algorithm == "infomap" else _louvain(found, time, seed)
    result = torch.zeros(k, dtype=torch.int64)
    for number, group in enumerate(sorted(groups, key=min), start=1):
        result[group] = number
    return result


def _louvain(found: Sequence[tuple[int, int, float]], time: float, seed: int) -> list[list[int]]:
    import networkx as nx

    graph = nx.Graph()
    graph.add_weighted_edges_from(found)
    groups = nx.community.louvain_communities(graph, resolution=1 / time, seed=seed % 2**32)
    return [sorted(group) for group in groups]


def _infomap(found: Sequence[tuple[int, int, float]], time: float, count: int, seed: int) -> list[list[int]]:
    from infomap import Infomap

    mapper = Infomap(
        two_level=True, directed=False, silent=True, markov_time=time, preferred_number_of_modules=count,
        seed=seed % (2**31 - 1) + 1,
    )  # fmt: skip
    for edge in found:
        mapper.add_link(*edge)
    mapper.run()
    groups: dict[int, list[int]] = {}
    for node in mapper.nodes:
        groups.setdefault(node.module_id, []).append(node.node_id)
    return list(groups.values())
