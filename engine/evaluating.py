"""`run.py eval`: the scores of a checkpoint; without changes they are those of its run, to the digit."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

import config
from common.errors import ConfigError
from engine import setup
from engine.callbacks import PanelKeeper, RunKeeper, numbers, progress
from engine.fitting import KMeansFit, PosthocFit
from engine.run_folder import RunFolder
from engine.training import collect_metrics, selection_key, write_files
from evaluation import report

log = logging.getLogger(__name__)


def evaluate(checkpoint_path: Path, tokens: list[str]) -> dict[str, Any]:
    """Evaluate a checkpoint; `tokens` may change values such as data.root or evaluation.matching.

    Writes metrics.json, tables and panels into `<run folder>/eval/<checkpoint name>/` and returns the metrics. A
    checkpoint written before its run ended has no k-means centroids: they are fitted here.
    """
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    named = config.parse_words(tokens)
    if "logger" in named:
        raise ConfigError(f"logger={named['logger']}: eval writes its scores into the run folder only")
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
    model = setup.restore_model(checkpoint, cfg, stored if stored.has_labels else data.meta, stored.has_labels)
    if any(key.startswith("evaluation.kmeans.") for key in named):
        model.kmeans_probe.fitted.fill_(False)  # fitted anew, as asked
    if any(key.startswith("evaluation.posthoc.") for key in named):
        model.posthoc_probe = None
    posthoc = PosthocFit(cfg, data)
    if model.posthoc_probe is None:
        posthoc.check()
    setup.connect(model, data)
    step = int(checkpoint["global_step"])
    parent = checkpoint_path.resolve().parent
    root = parent.parent if parent.name == "checkpoints" else parent
    folder = RunFolder(root / "eval" / checkpoint_path.stem, "new")
    (folder.path / "panels").mkdir(parents=True, exist_ok=True)
    pictures = PanelKeeper(cfg.evaluation.panels)
    callbacks: list[Callback] = [KMeansFit(cfg, data), posthoc, pictures, *progress(cfg.trainer.progress)]
    trainer = setup.build_trainer(cfg, step, callbacks, [], folder.path)
    trainer.validate(model, data, verbose=False)
    final = numbers(trainer.callback_metrics, "val/")
    keeper = RunKeeper(folder, cfg, selection_key(cfg, model))
    metrics = {**collect_metrics(cfg, data, model, keeper, final), "steps": step, "checkpoint": checkpoint_path.name}
    metrics = {
        key: value for key, value in metrics.items() if not key.startswith(("best/", "selection/", "train_images"))
    }
    if trainer.is_global_zero:
        write_files(model, pictures, folder, [])
        report.write_json(folder.metrics, metrics)
    return metrics
