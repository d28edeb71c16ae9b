"""Groups of one picture against its objects and classes: FG-ARI and mBO; and groups that are named by clusters.

Sources: Hubert and Arabie 1985 (the adjusted Rand index), Locatello et al. (NeurIPS 2020) for it on foreground alone,
Seitzer et al. (DINOSAUR, ICLR 2023) for the rest. Everything is counted in whole numbers and divided in float64.
K groups of a picture, n objects.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.clustering.utils import calculate_pair_cluster_confusion_matrix as pairs_of

from common.spec import IGNORE, ClassMeta
from evaluation import readout
from evaluation.foreground import object_classes
from evaluation.matching import Scores
from evaluation.metrics import SegmentationScore
from evaluation.readouts import Readout


def adjusted_rand(groups: Tensor, truth: Tensor) -> float:
    """The adjusted Rand index of two groupings of pixels, int64 [m] each, ids from 0; 1 where both are trivial.

    torchmetrics counts the pairs; its own index multiplies them as int64, which overflows from about 300 x 300 px on.
    """
    if not len(groups):
        return 1.0
    rows, columns = int(truth.max()) + 1, int(groups.max()) + 1
    table = torch.bincount(truth * columns + groups, minlength=rows * columns).view(rows, columns)
    (neither, merged), (split, both) = pairs_of(contingency=table.double().cpu()).tolist()
    if not merged and not split:
        return 1.0
    chance = (both + split) * (split + neither) + (both + merged) * (merged + neither)
    return 2 * (both * neither - split * merged) / chance


def overlaps(groups: Tensor, count: int, objects: Tensor, counted: Tensor | None = None) -> Tensor:
    """IoU of each object with each group: int64 [H,W] with ids below `count`, bool [n,H,W] -> float64 [n',K].

    counted: bool [H,W], pixels outside of it are in neither. Objects of which no pixel counts are left out.
    """
    counted = torch.ones_like(groups, dtype=torch.bool) if counted is None else counted
    objects = objects[:, counted]
    objects = objects[objects.any(1)].double()
    found = torch.nn.functional.one_hot(groups[counted], count).double()
    shared = objects @ found
    union = objects.sum(1)[:, None] + found.sum(0)[None] - shared
    return shared / union.clamp(min=1)


def best_overlap(found: Tensor) -> float:
    """The mean over objects of the best IoU [n,K] that any group has."""
    return float(found.amax(1).mean())


def matched_overlap(found: Tensor) -> float:
    """The same, each group for one object at most: the best matching of all; an object without a group has 0."""
    rows, columns = linear_sum_assignment(found.cpu().numpy(), maximize=True)
    return float(found.cpu()[rows, columns].sum() / len(found))


class PictureMeans(Metric):
    """Means over pictures of named values; a picture need not have all of them."""

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    sums: Tensor
    counts: Tensor

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.add_state("sums", torch.zeros(len(names), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(len(names), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, **values: float) -> None:
        """The values of one picture."""
        for name, value in values.items():
            self.sums[self.names.index(name)] += value
            self.counts[self.names.index(name)] += 1

    def compute(self) -> dict[str, float]:
        """In percent; values that no picture has are left out."""
        rows = zip(self.names, self.sums.tolist(), self.counts.tolist(), strict=True)
        return {name: 100 * value / count for name, value, count in rows if count}


class SlotScore(Readout):
    """`val/<name>/*` in percent, means over the pictures whose objects (or classes) are known and that show some.

    `fg_ari` (adjusted Rand index over pixels of objects; of a picture with a single one 1 if a group holds all of it,
    else 0), `fg_ari_several` (the same of pictures with two objects and more), `ari` (over all pixels, what is no
    object being one group), `mbo_i` and `miou_i` (objects one by one: best overlap, and with each group for one object
    at most), `mbo_c` (object classes, pieces of one class together). Pixels that two objects share, and crowds, count
    in none of those of objects.
    """

    instances = True

    def __init__(self, name: str, find: Callable[[Any, Mapping[str, Any]], Tensor], meta: ClassMeta) -> None:
        """find: model and batch -> group ids int64 [B,H,W]."""
        super().__init__()
        self.name, self.find = name, find
        self.groups = (name,)
        self.classes = object_classes(meta, []) if meta.has_labels else ()
        self.means = PictureMeans("fg_ari", "fg_ari_several", "ari", "mbo_i", "miou_i", "mbo_c")

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        groups = self.find(model, batch)
        self.means.update()  # torchmetrics warns of a metric that has seen nothing
        nothing = [None] * len(groups)
        known = batch.get("instances", nothing), batch.get("instances.crowd", nothing), batch.get("label", nothing)
        for own, valid, masks, crowd, label in zip(groups, batch["valid"], *known, strict=True):
            if masks is not None:
                self.update_objects(own, masks, crowd, valid)
            if label is not None and self.classes:
                self.update_classes(own, label)
        return {self.name: groups}

    def update_objects(self, groups: Tensor, masks: Tensor, crowd: Tensor, valid: Tensor) -> None:
        """One picture: ids int64 [H,W], its objects bool [n,H,W], which of them are crowds bool [n], valid [H,W]."""
        counted = valid & (masks[~crowd].sum(0) < 2) & ~masks[crowd].any(0)
        objects = masks[~crowd]
        found = overlaps(groups, int(groups.max()) + 1, objects, counted)
        if not len(found):
            return
        inside = objects.any(0) & counted
        truth = torch.where(objects.any(0), 1 + objects.int().argmax(0), 0)
        foreground = adjusted_rand(groups[inside], truth[inside])
        if len(found) > 1:
            self.means.update(fg_ari_several=foreground)
        self.means.update(
            fg_ari=foreground,
            ari=adjusted_rand(groups[counted], truth[counted]),
            mbo_i=best_overlap(found),
            miou_i=matched_overlap(found),
        )

    def update_classes(self, groups: Tensor, label: Tensor) -> None:
        """One picture: ids int64 [H,W] and its classes int64 [H,W]."""
        objects = torch.stack([label == name for name in self.classes])
        found = overlaps(groups, int(groups.max()) + 1, objects, label != IGNORE)
        if len(found):
            self.means.update(mbo_c=best_overlap(found))

    def compute(self) -> dict[str, float]:
        return self.means.compute()

    def reset(self) -> None:
        self.means.reset()

    def protocol(self) -> str:
        return (
            "FG-ARI over pixels of single objects, mBO by the best group, at the size of evaluation; mean of pictures"
        )


class RegionClasses(Readout):
    """`val/regions/*`: the cluster of the strongest region at every pixel, matched with classes as clusters always are.

    The masks are enlarged before the strongest is taken. Pixels of a region without a cluster are matched with nothing.
    The method gives `clustered_regions(batch)`: masks [B,S,h,w] and clusters int64 [B,S], -1 for none, from 0 below K.
    """

    name = "regions"

    def __init__(self, clusters: int, meta: ClassMeta, rules: Any) -> None:
        """rules: `evaluation.{matching,extra,absent,background}`."""
        super().__init__()
        self.clusters = clusters
        self.score = SegmentationScore(
            clusters + 1, meta.num_classes, rules.matching, rules.extra, rules.absent, rules.background, loose=1
        )

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        masks, clusters = model.clustered_regions(batch)
        if "label" in batch:
            strongest = readout.predict(masks, tuple(batch["image"].shape[-2:]))
            ids = torch.where(clusters < 0, self.clusters, clusters)
            self.score.update(ids.gather(1, strongest.flatten(1)).view_as(strongest), batch["label"])
        return {}

    def compute(self) -> Scores:
        return self.score.compute()

    def reset(self) -> None:
        self.score.reset()

    def protocol(self) -> str:
        return "clusters of whole regions, the strongest at every pixel; matching and background as of all clusters"
