"""Patches that show what a cluster is: the most typical ones, and the most doubtful, those nearly another cluster's."""

import heapq
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from evaluation import readout

TYPICAL, DOUBTFUL = 8, 4
"""Patches kept of every cluster."""
CONTEXT = 5
"""Side of what is shown around a patch, in patches."""
SMALLEST = 40
"""Its smallest side, px."""


@dataclass(frozen=True)
class Exemplar:
    """A patch with its surroundings."""

    picture: str
    """Id of the picture."""
    value: float
    """Cosine to the centroid (typical), or its lead over the next cluster (doubtful)."""
    other: int
    """The next nearest cluster."""
    crop: np.ndarray
    """uint8 [s,s,3]."""
    box: tuple[int, int, int, int]
    """The patch in the crop, px: left, top, right, bottom."""


@dataclass
class ClusterSurvey:
    """Counts and exemplars of K clusters, picture by picture; holds a few crops of each and nothing else.

    A picture gives a cluster one typical patch (highest cosine to the centroid) and one doubtful patch (smallest lead
    of its cosine over that to the next centroid) at most.
    """

    clusters: int
    patches: np.ndarray = field(init=False)
    """int64 [K]"""
    pictures: np.ndarray = field(init=False)
    """int64 [K]: pictures in which the cluster has a patch."""
    cosines: np.ndarray = field(init=False)
    """float64 [K]: sum of the cosines of its patches to the centroid."""
    seen: int = 0

    def __post_init__(self) -> None:
        self.patches, self.pictures = (np.zeros(self.clusters, dtype=np.int64) for _ in range(2))
        self.cosines = np.zeros(self.clusters)
        self._heaps: dict[str, list[list]] = {
            kind: [[] for _ in range(self.clusters)] for kind in ("typical", "doubtful")
        }
        self._order = itertools.count()

    def add(self, name: str, image: Tensor, valid: Tensor, scores: Tensor, codes: Tensor) -> None:
        """One picture: image [3,H,W] in 0..1, valid [H,W], dot products with unit centroids [K,h,w], codes [D,h,w]."""
        norm = torch.linalg.vector_norm(codes.float(), dim=0).clamp(min=readout.EPS)
        best = (scores.float() / norm).topk(min(2, self.clusters), dim=0)
        cosine = best.values[0].cpu().numpy()
        lead = (best.values[0] - best.values[-1]).cpu().numpy()
        ids, others = best.indices[0].cpu().numpy(), best.indices[-1].cpu().numpy()
        inside = readout.valid_patches(valid[None], tuple(ids.shape))[0].cpu().numpy()
        rows, columns = int(valid.any(1).sum()), int(valid.any(0).sum())
        stride = image.shape[1] / ids.shape[0]
        self.seen += 1
        for cluster in np.unique(ids[inside]).tolist():
            own = inside & (ids == cluster)
            self.patches[cluster] += own.sum()
            self.pictures[cluster] += 1
            self.cosines[cluster] += cosine[own].sum(dtype=np.float64)
            for kind, values, limit in (("typical", cosine, TYPICAL), ("doubtful", -lead, DOUBTFUL)):
                place = int(np.where(own, values, -np.inf).argmax())
                value = float(values.flat[place])
                heap = self._heaps[kind][cluster]
                if len(heap) == limit and value <= heap[0][0]:
                    continue
                crop, box = cut(image[:, :rows, :columns], divmod(place, ids.shape[1]), stride)
                found = Exemplar(name, abs(value), int(others.flat[place]), crop, box)
                (heapq.heappush if len(heap) < limit else heapq.heapreplace)(heap, (value, -next(self._order), found))

    def exemplars(self, kind: str, cluster: int) -> list[Exemplar]:
        """`typical` or `doubtful` patches of a cluster, the most so first."""
        return [found for _, _, found in sorted(self._heaps[kind][cluster], key=lambda item: item[:2], reverse=True)]

    def shares(self) -> np.ndarray:
        """float64 [K]: percent of all patches."""
        return 100 * self.patches / max(1, self.patches.sum())

    def mean_cosines(self) -> np.ndarray:
        """float64 [K]: mean cosine of a cluster's patches to its centroid; NaN without a patch."""
        return np.divide(self.cosines, self.patches, out=np.full(self.clusters, np.nan), where=self.patches > 0)


def cut(image: Tensor, patch: tuple[int, int], stride: float) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The surroundings of a patch (row, column) of a picture [3,H,W] as uint8 [s,s,3], and where the patch lies in it.

    At the border the cut is moved inwards; a picture smaller than it is repeated beyond its border.
    """
    side = max(SMALLEST, round(CONTEXT * stride))
    top, left = (
        min(max(round((place + 0.5) * stride - side / 2), 0), max(0, size - side))
        for place, size in zip(patch, image.shape[1:], strict=True)
    )
    rows = torch.arange(top, top + side).clamp(0, image.shape[1] - 1).to(image.device)
    columns = torch.arange(left, left + side).clamp(0, image.shape[2] - 1).to(image.device)
    crop = (image[:, rows][:, :, columns] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    y, x = round(patch[0] * stride) - top, round(patch[1] * stride) - left
    return crop, (x, y, x + round(stride), y + round(stride))


def nearest_clusters(centroids: Tensor, count: int = 3) -> list[list[tuple[int, float]]]:
    """For each of K centroids [K,D] the nearest others with their cosines, nearest first."""
    unit = torch.nn.functional.normalize(centroids.float().cpu(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    best = cosines.topk(min(count, len(unit) - 1), dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in pairs]
