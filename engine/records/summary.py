"""The parts of metrics.json: flat keys, scores in percent, null where there is nothing."""

from typing import Any

from omegaconf import DictConfig

from datamodules.base import SegmentationDataModule
from lightning_modules.base import UnsupervisedSegmenter
from reporting.report import plain


def scores(model: UnsupervisedSegmenter, final: dict[str, float]) -> dict[str, Any]:
    """`val/<probe>/<metric>` of the validation that has just ended; `final`: the values that it logged."""
    groups = [] if model.cfg.evaluation.partition == "none" else [f"_{group}" for group in model.meta.groups]
    names = [f"{name}{group}" for group in ("", *groups) for name in ("acc", "miou")]
    keys = [f"val/{probe}/{name}" for probe in model.validated for name in names]
    keys += [f"val/{probe}/{name}" for probe in model.label_free() for name in ("entropy", "confidence")]
    return plain({key: final.get(key) for key in [*keys, *(key for key in final if key not in keys)]})


def protocol(cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter) -> dict[str, Any]:
    """`protocol/*`: how the pictures were read out and the clusters named."""
    rules = cfg.evaluation
    found = {
        "protocol/crop": cfg.data.eval_crop,
        "protocol/resolution": str(cfg.data.eval_size),
        "protocol/interpolation": cfg.data.interpolation,
        "protocol/crf": model.crf is not None and str(model.crf.constants),
        "protocol/flip": rules.flip,
        "protocol/matching": f"{rules.matching}, extra {rules.extra}, absent {rules.absent}",
        "protocol/list": data.describe("val"),
    }
    if model.meta.groups and rules.partition != "none":
        found["protocol/partition"] = rules.partition
    if rules.kmeans.clusters is not None:
        found["protocol/kmeans_clusters"] = rules.kmeans.clusters
    roots = list(rules.kmeans.roots)
    if roots != ["own"] and not (roots == ["trained"] and data.own_source() == "train"):
        where = "those trained on" if roots == ["trained"] else ", ".join(roots)
        found["protocol/kmeans_pictures"] = f"{data.clustered_count()} pictures: {where}"
    if rules.kmeans.reduce != "none":
        found["protocol/kmeans_reduce"] = f"{rules.kmeans.reduce}, {rules.kmeans.components} components"
    if model.window is not None:
        found["protocol/window"] = f"{model.window[0]} px, at most {model.window[1]} px apart"
    if model.posthoc_probe is not None:
        posthoc = rules.posthoc
        found["protocol/linear_posthoc"] = (
            f"{posthoc.epochs} epochs, {posthoc.optimizer}, lr {posthoc.lr:g} {posthoc.schedule}, "
            f"weight decay {posthoc.weight_decay:g}"
        )
    for item in model.further.values():
        found |= {f"protocol/{row}": text for row, text in item.protocols().items()}
    return found


def facts(cfg: DictConfig, model: UnsupervisedSegmenter, steps: int) -> dict[str, Any]:
    """What was trained, on what, and for how long."""
    stands = {} if model.stands_on is None else {"stands_on": model.stands_on}
    return {
        "method": cfg.method.name,
        **stands,
        "headline": model.headline,
        "num_clusters": cfg.method.num_clusters,
        "uses_labels": model.uses_labels,
        "data": cfg.data.name,
        "backbone": cfg.backbone.name,
        "seed": cfg.seed,
        "steps": steps,
    }


def at_resolution(found: dict[str, Any], size: int | list[int]) -> dict[str, Any]:
    """The same values under `val@<size>/…` and `protocol@<size>/…`."""
    return {key.replace("/", f"@{size_name(size)}/", 1): value for key, value in found.items()}


def size_name(size: int | list[int]) -> str:
    """`320`, or `320x640` for height and width."""
    return str(size) if isinstance(size, int) else "x".join(str(side) for side in size)
