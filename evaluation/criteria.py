"""How well points fall into groups, without labels. Points are unit codes [n,D]; groups are ids [n]."""

import warnings

import torch
from torch import Tensor
from torchmetrics.functional.clustering import adjusted_rand_score, davies_bouldin_score

from retrieval import kmeans


def silhouette(points: Tensor, ids: Tensor) -> float:
    """Mean silhouette (Rousseeuw 1987) with the distance 1 - cosine, -1..1; NaN for fewer than two groups.

    s = (b - a) / max(a, b): a the mean distance to the others of the own group, b the least mean distance to another
    group; 0 for a point alone in its group. All pairs are held at once: meant for some thousand points.
    """
    present, groups = ids.unique(return_inverse=True)
    if len(present) < 2:
        return float("nan")
    points = points.double()
    member = torch.nn.functional.one_hot(groups, len(present)).double()
    counts = member.sum(0)
    sums = (1 - points @ points.T).clamp(min=0) @ member  # [n,groups]
    own = counts[groups]
    inside = sums.gather(1, groups[:, None])[:, 0] / (own - 1).clamp(min=1)
    outside = (sums / counts).scatter(1, groups[:, None], torch.inf).amin(1)
    score = (outside - inside) / torch.maximum(outside, inside).clamp(min=1e-12)
    return float(torch.where(own > 1, score, 0.0).mean())


def davies_bouldin(points: Tensor, ids: Tensor) -> float:
    """Davies-Bouldin index (1979) with Euclidean distances, lower is better; NaN for fewer than two groups."""
    present, groups = ids.unique(return_inverse=True)
    if not 2 <= len(present) < len(points):
        return float("nan")
    return float(davies_bouldin_score(points.double(), groups))


def stability(points: Tensor, k: int, seed: int, iterations: int) -> float:
    """Agreement of two k-means fits, each on another half of the points: adjusted Rand index over all points, up to 1.

    Where the data has K natural groups, both halves find them (Ben-Hur et al. 2002, with halves that do not overlap).
    """
    first, second = (
        kmeans.assign(points, kmeans.fit(half, k, seed=seed, iterations=iterations, restarts=2).centroids)
        for half in (points[::2], points[1::2])
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse invariant checks")  # about the inside of torchmetrics
        return float(adjusted_rand_score(first, second))
