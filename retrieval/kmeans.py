"""k-means over all points, seeded: faiss does the iterations (torch where faiss is missing), the starts are ours.

The starting centroids are drawn here and given to faiss: so a seed means the same start on every engine and every
version of faiss, and every draw is keyed. faiss itself would sub-sample to 256 points a cluster in silence; it is told
to use all of them.

Spherical k-means normalises the points itself and keeps the centroids on the unit sphere; the nearest centroid is the
one of largest inner product. A row of zero length has no direction: it takes no part in the fit, and is counted.

Sources: k-means++ (Arthur and Vassilvitskii, SODA 2007), with the best of a few candidates kept at every draw (their
section 5); spherical k-means (Dhillon and Modha, 2001).
"""

import logging
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError, LabelfreeError
from retrieval import search

log = logging.getLogger(__name__)

INITS = ("k-means++", "random")
SHORTEST = 1e-12
"""Length up to which a row counts as zero under spherical k-means."""
CLEARLY = 1e-5
"""Share by which a later start must be better: two starts often end in one optimum with its clusters in another order,
and rounding must not choose between them (one process and two would differ)."""
BLOCK_ROWS = 65536
"""Points in one block of the torch engine's sums (float64)."""


@dataclass(frozen=True)
class KMeans:
    """A fit. `centroids` float32 [K,D] on the points' device, unit length if spherical."""

    centroids: Tensor
    objective: float
    """Mean squared distance of the points to their own centroid (spherical: 2 - 2 cos); lower is better."""
    counts: Tensor
    """int64 [K]: points of each cluster under the final centroids, zero-length rows left out."""
    dead: list[int]
    """Clusters without a point."""
    skipped: int = 0
    """Zero-length rows that took no part (spherical only)."""


@torch.no_grad()
def fit(
    points: Tensor,
    k: int,
    *,
    spherical: bool = True,
    seed: int = 0,
    iterations: int = 50,
    restarts: int = 1,
    init: str = "k-means++",
    backend: str | None = None,
) -> KMeans:
    """k-means of `points` [N,D] (any floating type; detached, float32 inside) on their own device, all N of them used.

    `restarts` runs from different starts, the one of lowest objective wins; a run ends after `iterations` or when
    nothing improves. Same seed, points, engine and thread count: same centroids. `backend` as in `search`.
    Raises ConfigError for fewer points than clusters and unknown words, LabelfreeError for points that are not finite.
    """
    if init not in INITS:
        raise ConfigError(f"k-means: init={init}: must be one of {', '.join(INITS)}")
    for name, value in (("clusters", k), ("iterations", iterations), ("restarts", restarts)):
        if value < 1:
            raise ConfigError(f"k-means: {name}={value}: must be at least 1")
    engine = search.backend_for(points.device, backend)
    run = _torch_run if engine == "torch" else _faiss_run
    with search.exact(points.device):
        points, skipped = _prepare(points, k, spherical)
        winner = None
        for restart in range(restarts):
            start = initial_centroids(points, k, init, seed, restart)
            centroids = run(points, start, spherical, iterations)
            scores, ids = search.nearest(points, centroids, 1, "ip" if spherical else "l2", engine)
            objective = scores.double().mean().item()
            objective = 2 - 2 * objective if spherical else objective
            if winner is None or objective < winner[0] * (1 - CLEARLY):
                winner = objective, centroids, ids.squeeze(1)
    objective, centroids, ids = winner
    counts = torch.bincount(ids, minlength=k)
    dead = (counts == 0).nonzero().squeeze(1).tolist()
    if skipped:
        log.warning("k-means: %d of %d points have zero length and took no part", skipped, skipped + len(points))
    if dead:
        log.warning("k-means: %d of %d clusters have no point: %s", len(dead), k, ", ".join(map(str, dead)))
    return KMeans(centroids, objective, counts, dead, skipped)


def fit_distributed(points: Tensor, k: int, **settings) -> KMeans:
    """`fit` over the points of all ranks: gathered in rank order, fitted on rank 0, the result broadcast.

    points [n,D]: the rows of this rank, on the device that the process group communicates from (CUDA under NCCL); n may
    differ between ranks and be 0. The same result, and the same error, on every rank. In a single process it is `fit`.
    """
    if not distributed.active():
        return fit(points, k, **settings)
    points = distributed.gather_uneven(points)
    result, error = None, None
    if distributed.rank() == 0:
        try:
            result = fit(points, k, **settings)
        except Exception as caught:
            error = caught
    message = [None if error is None else (type(error).__name__, str(error))]
    dist.broadcast_object_list(message, src=0, device=points.device)
    if error is not None:
        raise error
    if message[0] is not None:
        name, text = message[0]
        known = {kind.__name__: kind for kind in (ConfigError, LabelfreeError, ValueError)}
        raise known.get(name, RuntimeError)(text)
    if result is None:
        centroids = points.new_empty(k, points.shape[1], dtype=torch.float32)
        result = KMeans(centroids, 0.0, torch.empty(k, dtype=torch.int64, device=points.device), [])
    centroids, counts = distributed.broadcast(result.centroids), distributed.broadcast(result.counts)
    scalars = torch.tensor([result.objective, result.skipped], dtype=torch.float64, device=points.device)
    objective, skipped = distributed.broadcast(scalars).tolist()
    dead = (counts == 0).nonzero().squeeze(1).tolist()
    return KMeans(centroids, objective, counts, dead, int(skipped))


@torch.no_grad()
def assign(points: Tensor, centroids: Tensor, spherical: bool = True, backend: str | None = None) -> Tensor:
    """The cluster of each point: int64 [N]. Spherical normalises the centroids; the points need not be normalised.

    The lowest id wins a tie, so zero-length points get cluster 0 under `spherical`.
    """
    if spherical:
        centroids = torch.nn.functional.normalize(centroids.float(), dim=1)
    return search.nearest(points, centroids, 1, "ip" if spherical else "l2", backend)[1].squeeze(1)


@torch.no_grad()
def initial_centroids(points: Tensor, k: int, init: str, seed: int, restart: int = 0) -> Tensor:
    """[K,D] rows of `points` (float32, normalised if the fit is spherical), drawn by (seed, restart)."""
    random = chance.numpy_generator(seed, f"k-means/{init}", restart)
    count = points.shape[0]
    if init == "random":
        return points[torch.from_numpy(random.choice(count, k, replace=False)).to(points.device)]
    norms = points.square().sum(dim=1)
    trials = 2 + int(math.log(k))
    chosen = [int(random.integers(count))]
    gap = _gaps(points, norms, chosen)[:, 0]  # squared distance to the nearest chosen point
    while len(chosen) < k:
        weights = gap.double().cpu().cumsum(0)
        if weights[-1] <= 0:  # fewer distinct points than clusters: the rest are copies
            left = torch.ones(count, dtype=torch.bool)
            left[chosen] = False
            chosen += random.choice(left.nonzero().squeeze(1).numpy(), k - len(chosen), replace=False).tolist()
            break
        draws = torch.from_numpy(random.random(trials)) * weights[-1]
        tried = torch.searchsorted(weights, draws, right=True).clamp_(max=count - 1).tolist()
        gaps = torch.minimum(gap[:, None], _gaps(points, norms, tried))
        best = int(gaps.double().sum(dim=0).argmin())
        chosen.append(tried[best])
        gap = gaps[:, best]
    return points[torch.tensor(chosen, device=points.device)]


def _gaps(points: Tensor, norms: Tensor, rows: list[int]) -> Tensor:
    """Squared distances [N,len(rows)] to some of the points; exactly 0 for a point to itself."""
    at = torch.tensor(rows, device=points.device)
    gaps = torch.addmm(norms[:, None] + norms[at], points, points[at].T, alpha=-2).clamp_(min=0)
    gaps[at, torch.arange(len(rows), device=points.device)] = 0
    return gaps


def _prepare(points: Tensor, k: int, spherical: bool) -> tuple[Tensor, int]:
    """(float32 [n,D] that the fit runs on, number of rows left out), or the error that names what is wrong."""
    if points.dim() != 2:
        raise ValueError(f"points have shape {tuple(points.shape)}: must be [N, D]")
    points = points.detach().to(torch.float32).contiguous()
    lengths = torch.linalg.vector_norm(points, dim=1)
    broken = (~torch.isfinite(lengths)).nonzero().squeeze(1)
    if len(broken):
        raise LabelfreeError(
            f"k-means: {len(broken)} of {len(points)} points are not finite (first: row {int(broken[0])}); "
            "look for a learning rate or a precision that is too much for this run"
        )
    total = len(points)
    if spherical:
        keep = lengths > SHORTEST
        if not bool(keep.all()):
            points, lengths = points[keep], lengths[keep]
        points = points / lengths[:, None]
    if len(points) < k:
        left_out = f" of more than zero length ({total} in all)" if len(points) < total else ""
        raise ConfigError(
            f"k-means: {k} clusters from {len(points)} points{left_out}: there must be at least one point a cluster; "
            "lower method.num_clusters or give more pictures"
        )
    return points, total - len(points)


def _faiss_run(points: Tensor, start: Tensor, spherical: bool, iterations: int) -> Tensor:
    """One run of faiss, with its index on the device of the points (the points visit the host: faiss sums there).

    A cluster that loses its points takes over half of a large one. faiss draws nothing by its own seed here: all starts
    are given, and all points are used.
    """
    faiss, _ = search.load_faiss()
    (count, dim), k = points.shape, start.shape[0]
    settings = faiss.ClusteringParameters()
    settings.niter = iterations
    settings.spherical = spherical
    settings.min_points_per_centroid = 1
    settings.max_points_per_centroid = count // k + 1
    clustering = faiss.Clustering(dim, k, settings)
    faiss.copy_array_to_vector(start.cpu().numpy().ravel(), clustering.centroids)
    if points.is_cuda:
        place = faiss.GpuIndexFlatConfig()
        place.device = points.device.index  # never faiss.Kmeans(gpu=True): it spreads over all visible GPUs
        kind = faiss.GpuIndexFlatIP if spherical else faiss.GpuIndexFlatL2
        index = kind(search.gpu_resources(points.device.index), dim, place)
    else:
        index = faiss.IndexFlatIP(dim) if spherical else faiss.IndexFlatL2(dim)
    clustering.train(points.cpu().numpy(), index)
    centroids = faiss.vector_float_to_array(clustering.centroids).reshape(k, dim)
    return torch.from_numpy(centroids.copy()).to(points.device)


def _torch_run(points: Tensor, start: Tensor, spherical: bool, iterations: int) -> Tensor:
    """One run of Lloyd's iterations, sums in float64. A cluster that loses its points takes the worst served point."""
    centroids, before = start, None
    for _ in range(iterations):
        scores, ids = search.nearest(points, centroids, 1, "ip" if spherical else "l2", "torch")
        ids = ids.squeeze(1)
        if before is not None and torch.equal(ids, before):
            break
        before = ids
        sums = points.new_zeros(centroids.shape, dtype=torch.float64)
        for first in range(0, len(points), BLOCK_ROWS):
            block = slice(first, first + BLOCK_ROWS)
            sums.index_add_(0, ids[block], points[block].double())
        counts = torch.bincount(ids, minlength=len(centroids))
        empty = (counts == 0).nonzero().squeeze(1)
        centroids = sums / counts.clamp(min=1)[:, None]
        if spherical:
            centroids = torch.nn.functional.normalize(centroids, dim=1)
        centroids = centroids.float()
        if len(empty):
            worst = scores.squeeze(1).sort(descending=not spherical, stable=True).indices[: len(empty)]
            centroids[empty] = points[worst]
    return centroids
