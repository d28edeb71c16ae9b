"""Clusters of objects by the spectrum of their neighbour graph, and which objects are at a cluster's core, after COMUS
(Zadaianchuk et al., ICLR 2023).

An object is a vector; it is joined with its nearest ones. The first eigenvectors of the graph's Laplacian are new
coordinates, in which k-means finds clusters and the cosine to a cluster's centre says how sure an object is of it. The
graph is sparse throughout: a whole eigenproblem is solved up to some thousand objects alone, and one of each connected
part, since the vectors of value 0 are known.
Glossary: n objects, D numbers of one, K clusters, m coordinates (COMUS: K), c connected components.
"""

import logging
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from scipy import sparse
from scipy.sparse import csgraph
from scipy.sparse.linalg import eigsh
from torch import Tensor

from common import chance
from common.errors import ConfigError, LabelfreeError
from grouping import eigen
from retrieval import kmeans, search

log = logging.getLogger(__name__)

DENSE = 1000
"""Up to so many objects of a component the dense solver is faster (float64, of the wanted vectors alone)."""
TOLERANCE = 1e-9
"""Of the sparse solver, relative to the eigenvalue."""


@dataclass(frozen=True)
class Embedding:
    """Coordinates of n objects."""

    maps: Tensor
    """float64 [n,m]: D^-1/2 u of the first m unit eigenvectors u of I - D^-1/2 B D^-1/2, the entry of largest magnitude
    positive. Of a connected graph the first is constant."""
    values: Tensor
    """float64 [m+1], ascending: their eigenvalues and the next one (inf where the graph has no more)."""
    components: int
    """c; the first c values are 0."""


@dataclass(frozen=True)
class Clusters:
    """Clusters of n objects. All on the CPU."""

    labels: Tensor
    """int64 [n], 0..K-1."""
    centres: Tensor
    """float64 [K,m]: mean coordinates of each cluster."""
    distance: Tensor
    """float64 [n]: 1 - cosine of an object's coordinates to its centre."""
    core: Tensor
    """bool [n]."""
    embedding: Embedding


@torch.no_grad()
def neighbour_graph(vectors: Tensor, neighbours: int) -> sparse.csr_matrix:
    """A = (G + G^T) / 2 of the graph G in which an object points to its `neighbours` nearest by Euclidean distance,
    itself among them, with weight 1. float64 [n,n], entries 0.5 and 1.

    vectors [n,D], as they are (no normalisation). Raises ConfigError for fewer than two neighbours or too few objects,
    LabelfreeError for vectors that are not finite.
    """
    count = len(vectors)
    if not 2 <= neighbours <= count:
        raise ConfigError(
            f"method.graph.neighbours={neighbours}: of {count} objects each can have 2 to {count}, itself included"
        )
    if not bool(torch.isfinite(vectors).all()):
        raise LabelfreeError("neighbours: vectors of objects are not finite; look for a precision that is too low")
    rows = vectors.detach().double()
    rows = (rows - rows.mean(0)).float()  # distances stay, and lose no digits to a common part
    ids = search.nearest(rows, rows, neighbours, "l2")[1].cpu().numpy()
    starts = np.arange(0, count * neighbours + 1, neighbours)
    graph = sparse.csr_matrix((np.ones(ids.size), ids.ravel(), starts), shape=(count, count))
    return ((graph + graph.T) / 2).tocsr()


def spectral_embedding(graph: sparse.csr_matrix, count: int, *, seed: int = 0) -> Embedding:
    """The first `count` generalised eigenvectors of the normalised Laplacian of a graph; its diagonal is not looked at.

    A graph of several components has as many vectors of value 0, of which any turn is as good: here each is constant on
    one component, the largest first. Where there are more of them than `count`, the objects of the others have
    coordinates 0, and that is logged. seed: of the sparse solver's first vector; changes results within its tolerance.
    Raises ConfigError for fewer objects than coordinates.
    """
    nodes = graph.shape[0]
    if count > nodes:
        raise ConfigError(f"method.num_clusters: {nodes} objects have no {count} coordinates; lower it")
    weights = sparse.csr_matrix(graph, copy=True)
    weights.setdiag(0)
    weights.eliminate_zeros()
    parts, names = csgraph.connected_components(weights, directed=False)
    if parts > 1:
        log.info("objects: their graph falls into %d components%s", parts, "" if parts <= count else _too_many(count))
    order = np.argsort(-np.bincount(names), kind="stable")
    found = [_component(weights, np.flatnonzero(names == name), count + 1, seed) for name in order]
    values = np.concatenate([own for own, _ in found])
    chosen = np.argsort(values, kind="stable")[: count + 1]
    maps = np.zeros((nodes, len(chosen)))
    whose = np.concatenate([np.full(len(own), place) for place, (own, _) in enumerate(found)])
    first = np.concatenate([[0], np.cumsum([len(own) for own, _ in found])])
    for column, number in enumerate(chosen):
        place = whose[number]
        maps[names == order[place], column] = found[place][1][:, number - first[place]]
    oriented = eigen.oriented(torch.from_numpy(maps[:, :count].T.copy()), "peak").T.contiguous()
    known = np.full(count + 1, np.inf)
    known[: len(chosen)] = values[chosen]
    return Embedding(oriented, torch.from_numpy(known), int(parts))


def _too_many(count: int) -> str:
    return f", more than the {count} clusters: some of their objects get no coordinates; raise method.graph.neighbours"


def _component(weights: sparse.csr_matrix, rows: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first eigenvalues [k] and generalised vectors [m,k] of the component of these m objects, k = min(count, m).

    The first value is 0 and its vector constant, as they are known to be. Beyond DENSE objects k is m - 1 at most.
    """
    own = weights[rows][:, rows] if len(rows) < weights.shape[0] else weights
    degree = np.asarray(own.sum(1)).ravel()
    if len(rows) == 1:
        return np.zeros(1), np.ones((1, 1))
    half = 1 / np.sqrt(degree)
    scaled = sparse.diags(half) @ own @ sparse.diags(half)
    count = min(count, len(rows))
    if len(rows) <= DENSE:
        last = len(rows) - 1
        tops, vectors = scipy.linalg.eigh(scaled.toarray(), subset_by_index=[last - count + 1, last])
    else:
        start = chance.numpy_generator(seed, "objects.embedding").standard_normal(len(rows))
        tops, vectors = eigsh(scaled, k=min(count, len(rows) - 1), which="LA", v0=start, tol=TOLERANCE)
    order = np.argsort(-tops, kind="stable")
    values, maps = 1 - tops[order], half[:, None] * vectors[:, order]
    values[0], maps[:, 0] = 0, 1 / np.sqrt(degree.sum())
    return values, maps


@torch.no_grad()
def spectral_clusters(
    graph: sparse.csr_matrix, count: int, *, core: float, seed: int, coordinates: int | None = None, restarts: int = 10
) -> Clusters:
    """`count` clusters of the objects of a graph by k-means in spectral coordinates, and their cores.

    core: see `core_objects`. coordinates: as many as clusters where None. restarts: of k-means, with starts that the
    seed keys.
    """
    embedding = spectral_embedding(graph, coordinates or count, seed=seed)
    fit = kmeans.fit(embedding.maps, count, spherical=False, seed=seed, restarts=restarts, iterations=300)
    labels = kmeans.assign(embedding.maps.float(), fit.centroids, spherical=False)
    sums = embedding.maps.new_zeros(count, embedding.maps.shape[1]).index_add_(0, labels, embedding.maps)
    centres = sums / torch.bincount(labels, minlength=count).clamp(min=1)[:, None]
    distance, inside = core_objects(embedding.maps, centres, labels, core)
    return Clusters(labels, centres, distance, inside, embedding)


@torch.no_grad()
def core_objects(maps: Tensor, centres: Tensor, labels: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    """How far objects are from their centres, and which of them are a cluster's core: float64 and bool [n].

    maps [n,m], centres [K,m], labels int64 [n] in 0..K-1. The distance is 1 - cosine; at the core is what lies nearer
    than the `percent` percentile of its cluster (linear between two objects), strictly, so the outermost of a small
    cluster is not. 100 keeps all. Raises ConfigError for a percentile outside 0 to 100.
    """
    if not 0 < percent <= 100:
        raise ConfigError(f"method.core={percent:g}: expected a percentile above 0, at most 100")
    rows, own = maps.double().cpu(), centres.double().cpu()[labels.cpu()]
    lengths = torch.linalg.vector_norm(rows, dim=1) * torch.linalg.vector_norm(own, dim=1)
    distance = 1 - (rows * own).sum(1) / torch.where(lengths > 0, lengths, 1.0)
    inside = torch.ones(len(rows), dtype=torch.bool)
    if percent < 100:
        for name in labels.cpu().unique():
            members = labels.cpu() == name
            inside[members] = distance[members] < np.percentile(distance[members].numpy(), percent)
    return distance, inside
