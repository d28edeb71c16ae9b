"""Streaming scores of a whole set: one int64 matrix, summed over ranks, matched only after the sum."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

from evaluation import readout
from evaluation.matching import Scores, check_policies, score


class SegmentationScore(Metric):
    """Accuracy and mIoU of K predicted ids against C classes over everything that `update` has seen.

    State `counts` [K,C] int64 (rows predictions, columns labels; a float would lose counts beyond 2^24), summed over
    ranks, so the result does not depend on batches or ranks. `compute` returns `matching.Scores` in percent. The
    policies are those of `matching.score`; `matching="identity"` scores class predictions as they are.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    counts: Tensor

    def __init__(
        self,
        clusters: int,
        classes: int,
        matching: str = "hungarian",
        extra: str = "merge",
        absent: str = "skip",
        background: int = 0,
        loose: int = 0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if clusters < 1 or classes < 1:
            raise ValueError(f"SegmentationScore needs clusters and classes, got {clusters} and {classes}")
        self.policy = {"matching": matching, "extra": extra, "absent": absent, "background": background,
                       "loose": loose}  # fmt: skip
        check_policies(matching, extra, absent)
        self.clusters, self.classes = clusters, classes
        self.add_state("counts", torch.zeros(clusters, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Add the pixels of pred [B,H,W] (0..K-1) with target [B,H,W] in 0..C-1; all other targets are ignored.

        Raises ValueError for another shape, and for predictions outside 0..K-1 on labelled pixels: left out silently
        they would raise the score.
        """
        if pred.shape != target.shape:
            raise ValueError(f"pred {tuple(pred.shape)} and target {tuple(target.shape)} differ in shape")
        pred, target = pred.long(), target.long()
        outside = (pred < 0) | (pred >= self.clusters)
        cells = self.clusters * self.classes
        index = pred * self.classes + target
        index = torch.where(outside, cells, index)
        index = torch.where((target < 0) | (target >= self.classes), cells + 1, index)
        counted = torch.bincount(index.flatten(), minlength=cells + 2)
        if counted[cells]:
            raise ValueError(f"{int(counted[cells])} labelled pixels have a prediction outside 0..{self.clusters - 1}")
        self.counts += counted[:cells].view(self.clusters, self.classes)

    def compute(self) -> Scores:
        """Match and score the counts; under DDP torchmetrics has summed them before."""
        return score(self.counts, **self.policy)


class ClusterUsage(Metric):
    """What can be said about clusters without a label: do they collapse, and do the codes gather around them?

    `compute` returns a dict of percentages (NaN where nothing can be said):
    - `entropy`: 100 H(u) / log K, u_k the share of patches that cluster k wins over the whole set. 100: all clusters
      are used alike; 0: one cluster takes all; NaN for K = 1.
    - `confidence`: 100 times the mean over patches of the cosine between the code and its winning centroid. (A softmax
      with the usual alpha = 2 hardly leaves 1/K, so it would tell K rather than the fit.)
    Neither is a score of quality: a collapsed network has confidence 100, which the entropy then shows.
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False
    wins: Tensor
    cosine: Tensor

    def __init__(self, clusters: int, **kwargs):
        super().__init__(**kwargs)
        self.add_state("wins", torch.zeros(clusters, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("cosine", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, scores: Tensor, codes: Tensor, valid: Tensor | None = None) -> None:
        """Add the patches of scores [B,K,h,w] (dot products with unit centroids) and their codes [B,D,h,w].

        valid bool [B,H,W] at any resolution: patches that lie for more than half on padding are left out.
        """
        cluster, cosine = readout.winners(scores, codes)
        if valid is not None:
            inside = readout.valid_patches(valid, cluster.shape[-2:])
            cluster, cosine = cluster[inside], cosine[inside]
        self.wins += torch.bincount(cluster.flatten(), minlength=len(self.wins))
        self.cosine += cosine.sum(dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """`{"entropy": percent, "confidence": percent}` over all patches of all ranks."""
        patches = int(self.wins.sum())
        if not patches:
            return {"entropy": math.nan, "confidence": math.nan}
        share = self.wins.double() / patches
        entropy = float(torch.special.entr(share).sum())
        spread = 100 * entropy / math.log(len(share)) if len(share) > 1 else math.nan
        return {"entropy": spread, "confidence": 100 * float(self.cosine) / patches}
