"""What shows a cluster: its most typical patches, the most doubtful, those nearly another cluster's, and the pictures
that it takes most of."""

import heapq
import itertools
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import readout

TYPICAL, DOUBTFUL, SCENES = 8, 4, 4
"""Patches, and pictures, kept of every cluster."""
SCENE = 220
"""Longer side of a kept picture, px."""
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


@dataclass(frozen=True)
class Scene:
    """A small picture in which everything but the cluster is faded."""

    picture: str
    share: float
    """Percent of its patches that the cluster has."""
    image: np.ndarray
    """uint8 [h,w,3]"""


@dataclass
class ClusterSurvey:
    """Counts and exemplars of K clusters, picture by picture; holds a few crops and small pictures of each.

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
            kind: [[] for _ in range(self.clusters)] for kind in ("typical", "doubtful", "scene")
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
        small: tuple[Tensor, Tensor] | None = None  # made where a cluster keeps the picture, once for all of them
        for cluster in np.unique(ids[inside]).tolist():
            own = inside & (ids == cluster)
            self.patches[cluster] += own.sum()
            self.pictures[cluster] += 1
            self.cosines[cluster] += cosine[own].sum(dtype=np.float64)
            for kind, values, limit in (("typical", cosine, TYPICAL), ("doubtful", -lead, DOUBTFUL)):
                place = int(np.where(own, values, -np.inf).argmax())
                value = float(values.flat[place])
                if self._worse(kind, cluster, value, limit):
                    continue
                crop, box = cut(image[:, :rows, :columns], divmod(place, ids.shape[1]), stride)
                self._keep(kind, cluster, value, limit, Exemplar(name, abs(value), int(others.flat[place]), crop, box))
            share = 100 * float(own.sum() / inside.sum())
            if not self._worse("scene", cluster, share, SCENES):
                small = small or shrunk(image, scores, (rows, columns))
                self._keep("scene", cluster, share, SCENES, Scene(name, share, faded(*small, cluster)))

    def _worse(self, kind: str, cluster: int, value: float, limit: int) -> bool:
        heap = self._heaps[kind][cluster]
        return len(heap) == limit and value <= heap[0][0]

    def _keep(self, kind: str, cluster: int, value: float, limit: int, found: Exemplar | Scene) -> None:
        heap = self._heaps[kind][cluster]
        (heapq.heappush if len(heap) < limit else heapq.heapreplace)(heap, (value, -next(self._order), found))

    def exemplars(self, kind: str, cluster: int) -> list[Exemplar]:
        """`typical` or `doubtful` patches of a cluster, the most so first."""
        return self._best(kind, cluster)

    def scenes(self, cluster: int) -> list[Scene]:
        """The pictures that a cluster takes most of, the largest share first."""
        return self._best("scene", cluster)

    def _best(self, kind: str, cluster: int) -> list:
        return [found for _, _, found in sorted(self._heaps[kind][cluster], key=lambda item: item[:2], reverse=True)]

    def shares(self) -> np.ndarray:
        """float64 [K]: percent of all patches."""
        return 100 * self.patches / max(1, self.patches.sum())

    def mean_cosines(self) -> np.ndarray:
        """float64 [K]: mean cosine of a cluster's patches to its centroid; NaN without a patch."""
        return np.divide(self.cosines, self.patches, out=np.full(self.clusters, np.nan), where=self.patches > 0)


def shrunk(image: Tensor, scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A picture [3,H,W], of which `size` is no padding, made small, [3,h',w'], and its clusters by scores [K,h,w]:
    int64 [h',w']."""
    scale = min(1.0, SCENE / max(size))
    frame = [max(1, round(scale * side)) for side in image.shape[1:]]
    rows, columns = (max(1, round(scale * side)) for side in size)
    small = F.interpolate(image[None].float(), size=frame, mode="bilinear", antialias=True)[0, :, :rows, :columns]
    return small, readout.predict(scores[None], (frame[0], frame[1]))[0, :rows, :columns].to(small.device)


def faded(small: Tensor, ids: Tensor, cluster: int) -> np.ndarray:
    """A picture [3,h,w] (more channels are not shown), faded where its cluster is another one: uint8 [h,w,3]."""
    others = 0.7 + 0.2 * small[:3].mean(0, keepdim=True)
    return (
        (torch.where(ids == cluster, small[:3], others).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    )


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
    crop = (image[:3, rows][:, :, columns] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    y, x = round(patch[0] * stride) - top, round(patch[1] * stride) - left
    return crop, (x, y, x + round(stride), y + round(stride))


def nearest_clusters(centroids: Tensor, count: int = 3) -> list[list[tuple[int, float]]]:
    """For each of K centroids [K,D] the nearest others with their cosines, nearest first."""
    unit = F.normalize(centroids.float().cpu(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2)
    best = cosines.topk(min(count, len(unit) - 1), dim=1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(ids, values, strict=True)) for ids, values in pairs]
