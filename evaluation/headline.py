"""The score that a run is known by: that of the probe which its method names (`headline`), read from flat metrics."""

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = ("miou", "iou", "mask_AP", "entropy")
"""Metrics that can be a headline, the first that is there: of classes, of one object a picture, of single objects,
without labels."""
SHOWN = {"acc": "acc", "miou": "mIoU", "iou": "IoU", "corloc": "CorLoc", "entropy": "entropy",
         "mask_AP": "mask AP",
         "confidence": "confidence"}  # fmt: skip
"""Metrics as people write them."""


def probe_of(metrics: Mapping[str, Any]) -> str:
    """The headline probe of metrics.json; of one that does not name it: `own` where there is such a probe."""
    named = metrics.get("headline")
    return named or ("own" if any(key.startswith("val/own/") for key in metrics) else "cluster")


def key_of(metrics: Mapping[str, Any], stage: str = "val") -> str | None:
    """`val/kmeans/miou`, the key of the headline score; None where the run has none (an object finder's without
    labels)."""
    keys = (f"{stage}/{probe_of(metrics)}/{name}" for name in NAMES)
    return next((key for key in keys if metrics.get(key) is not None), None)


def expected(probe: str) -> str:
    """The key that the headline score of a probe has where there are labels, before any run is there."""
    named = {"foreground": "iou", "instances": "mask_AP"}
    return f"val/{probe}/{named.get(probe, 'miou')}"


def first(probe: str, names: Sequence[str]) -> list[str]:
    """Names of probes with the headline in front, the others in their order."""
    return sorted(names, key=lambda name: name != probe)


def sentence(metrics: Mapping[str, Any]) -> str:
    """`score: kmeans, 30.6 mIoU, 12 clusters`, the line below the closing table."""
    key = key_of(metrics)
    score = "" if key is None else f", {metrics[key]:.1f} {SHOWN[key.rsplit('/', 1)[1]]}"
    clusters = metrics.get("num_clusters")
    return f"score: {probe_of(metrics)}{score}" + ("" if clusters is None else f"; {clusters} clusters")
