"""`run.py eval`: the scores of a checkpoint; without changes they are those of its run, to the digit."""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

import config
from common.errors import ConfigError
from datamodules.base import SegmentationDataModule
from engine import ahead, setup
from engine.callbacks import screen
from engine.callbacks.panel_keeper import PanelKeeper
from engine.callbacks.progress import TrainingProgress
from engine.callbacks.run_keeper import numbers
from engine.fitting import FCNFit, KMeansFit, OwnFit, PosthocFit, RetrievalFit
from engine.overclustering import OverclusterFit
from engine.records import environment, recipes, summary
from engine.training import write_files
from lightning_modules.base import UnsupervisedSegmenter
from reporting import report

log = logging.getLogger(__name__)


RECORD = "evaluated.json"
"""Beside the scores: which checkpoint was evaluated, and with which words."""


def evaluate(checkpoint_path: Path, tokens: list[str], into: Path | None = None) -> dict[str, Any]:
    """Evaluate a checkpoint; `tokens` may change values such as data.root or evaluation.matching.

    Writes metrics.json, tables and panels into `<run folder>/eval/<checkpoint name>/` (or `into`), with the
    configuration and what it was made with, so that comparisons take the folder; returns the metrics. A
    checkpoint written before its run ended has no k-means centroids: they are fitted here.
    `evaluation.resolutions=[320,448]`: all of it at each resolution, into `eval/<checkpoint name>@320+448/`, with keys
    `val@320/<probe>/<metric>` and `protocol@320/…`; probes that have to be fitted are fitted once, at data.eval_size.
    """
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    named = config.parse_words(tokens)
    ahead.expect_evaluation(named)
    alone = {"trainer.accelerator": "auto", "trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
    stored_cfg = config.changed(config.restore(checkpoint["labelfree"]["config"]), alone)
    cfg = config.restore(config.plain(stored_cfg), tokens)
    cfg, data = setup.build_data(cfg)
    stored = setup.stored_meta(checkpoint)
    if data.meta.has_labels and stored.has_labels and data.meta.names != stored.names:
        raise ConfigError(
            f"data.root={cfg.data.root}: its {data.meta.num_classes} classes are not the {stored.num_classes} that the "
            "linear probe of this checkpoint was trained for"
        )
    anew = any(key.startswith("evaluation.kmeans.") for key in named)  # as asked
    meta = data.meta if data.meta.has_labels else stored
    model = setup.restore_model(checkpoint, cfg, meta, stored.has_labels, refit=anew)
    if any(key.startswith("evaluation.posthoc.") for key in named):
        model.posthoc_probe = None
    centroids, posthoc = KMeansFit(cfg, data), PosthocFit(cfg, data)
    if not model.kmeans_probe.fitted:
        centroids.check(model)
    if model.posthoc_probe is None:
        posthoc.check()
    head = FCNFit(cfg, data)
    if any(key.startswith("evaluation.fcn.") for key in named) and "fcn" in model.further:
        model.further["fcn"].probe = None
    if not head.present(model):
        head.check()
    OverclusterFit(cfg, data).check(model)
    setup.connect(model, data)
    step = int(checkpoint["global_step"])
    root, started = evaluations(checkpoint_path), time.perf_counter()
    # At data.eval_size, once, where they are not there yet.
    fits: list[Callback] = [OwnFit(), centroids, posthoc, head, RetrievalFit(cfg, data)]
    sizes = config.plain(cfg)["evaluation"]["resolutions"]
    metrics: dict[str, Any] = {}
    if not sizes:
        folder = into or root / checkpoint_path.stem
        (folder / RECORD).unlink(missing_ok=True)  # not whole any more
        metrics |= evaluate_once(cfg, data, model, [*fits, OverclusterFit(cfg, data)], step, folder)
    else:
        for size in sizes:
            model.backbone.check_size(size, "evaluation.resolutions")
        folder = root / f"{checkpoint_path.stem}@{'+'.join(map(summary.size_name, sizes))}"
        sized = [setup.build_data(config.changed(cfg, {"data.eval_size": size})) for size in sizes]
        for size, (changed, other) in zip(sizes, sized, strict=True):
            log.info("at %s px", summary.size_name(size))
            setup.connect(model, other)
            own = [*fits, OverclusterFit(changed, other)]  # of the codes that are evaluated
            found = evaluate_once(changed, other, model, own, step, folder / summary.size_name(size))
            metrics |= summary.at_resolution(found, size)
    metrics |= {**summary.facts(cfg, model, step), "checkpoint": checkpoint_path.name}
    metrics |= published(checkpoint)
    if rank_zero_only.rank == 0:
        report.write_json(folder / "metrics.json", metrics)
        config.save(cfg, folder / "config.yaml")
        seconds, where = time.perf_counter() - started, setup.device(cfg)
        made = environment.describe(cfg.seed, where, environment.git_commit(), seconds, None, 1)
        report.write_json(folder / "environment.json", made)
        report.write_json(folder / RECORD, record(checkpoint_path, tokens))
    return metrics


def evaluations(checkpoint_path: Path) -> Path:
    """Where the evaluations of a checkpoint lie."""
    parent = checkpoint_path.resolve().parent
    return (parent.parent if parent.name == "checkpoints" else parent) / "eval"


def record(checkpoint_path: Path, tokens: Sequence[str]) -> dict[str, Any]:
    """What tells this evaluation from others: the content of the checkpoint, and the words."""
    with checkpoint_path.open("rb") as handle:
        content = hashlib.file_digest(handle, "sha256").hexdigest()
    return {"checkpoint": checkpoint_path.name, "sha256": content, "words": sorted(tokens)}


def kept_in(checkpoint_path: Path, tokens: Sequence[str]) -> Path:
    """A folder of its own for the evaluation of a checkpoint with these words."""
    mark = hashlib.sha256(repr(sorted(tokens)).encode()).hexdigest()[:6]
    return evaluations(checkpoint_path) / f"{checkpoint_path.stem}-{mark}"


def is_kept(folder: Path, checkpoint_path: Path, tokens: Sequence[str]) -> bool:
    """Whether a folder holds this evaluation of the checkpoint as it is now."""
    path = folder / RECORD
    if not (path.is_file() and checkpoint_path.is_file()):
        return False
    return json.loads(path.read_text()) == record(checkpoint_path, tokens)


def published(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Of an imported checkpoint: what it is, and the figures published for it, `published/<probe>/<metric>`."""
    imported = checkpoint["labelfree"].get("imported")
    if imported is None:
        return {}
    found = {"imported/from": imported["from"], "imported/file": imported["file"]}
    if imported["recipe"] is None:
        return found
    figures, source = recipes.figures(imported["recipe"])
    return found | {f"published/{key}": value for key, value in figures.items()} | {"published/source": source}


def evaluate_once(
    cfg: DictConfig,
    data: SegmentationDataModule,
    model: UnsupervisedSegmenter,
    fits: list[Callback],
    step: int,
    folder: Path,
) -> dict[str, Any]:
    """One validation; panels and tables go into `folder`. Returns its `val/*` and `protocol/*`."""
    (folder / "panels").mkdir(parents=True, exist_ok=True)
    pictures = PanelKeeper(cfg.evaluation.panels)
    callbacks = [*fits, pictures, TrainingProgress(cfg, step)]
    trainer = setup.build_trainer(cfg, step, callbacks, [], folder)
    with screen.showing(cfg.trainer.progress):
        trainer.validate(model, data, verbose=False)
    if trainer.is_global_zero:
        write_files(model, pictures, folder, [])
    return summary.scores(model, numbers(trainer.callback_metrics, "val/")) | summary.protocol(cfg, data, model)
