"""Finished runs and evaluations as a comparison takes them: read from their folders, or scored anew and read then."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import config
from common.errors import ConfigError
from engine import evaluating
from engine.records import run_folder
from engine.records.metrics_file import read_metrics
from lightning_modules import registry
from reporting.comparison import Finished
from reporting.report import LAST_STEP

log = logging.getLogger("labelfree.compare")

FILES = ("metrics.json", "config.yaml", "environment.json")
"""Of a finished run."""
KEPT = ("selection/rule", "selection/uses_labels", "train_images_per_second")
"""Of a run's metrics, beside the scores of an evaluation."""


def read_run(folder: Path) -> Finished:
    """A finished run, or an evaluation: what `run.py eval` left in `<run>/eval/<checkpoint>`. Raises ConfigError."""
    path = folder / "metrics.json"
    if path.is_file() and "checkpoint" in read_metrics(path):
        return read_evaluation(folder)
    found = Finished.read(folder, config.flatten, stored)
    return replace(found, metrics=read_metrics(path), title=title(found.metrics))


def stored(path: Path) -> dict[str, Any]:
    """A stored configuration, with the defaults of keys that are younger."""
    return config.with_defaults(run_folder.read_yaml(path))


def title(metrics: Mapping[str, Any]) -> str:
    """The name in papers of a run's method, with that of the one it stands on; empty where one of them is gone."""
    methods = [metrics[key] for key in ("method", "stands_on") if key in metrics]
    known = all(method in registry.names() for method in methods)
    return " on ".join(registry.method_class(method).title for method in methods) if known else ""


def read_evaluation(folder: Path) -> Finished:
    """An evaluation as a run: its scores and settings, and of the run it belongs to, where that is beside it, what
    training was like. Raises ConfigError."""
    metrics, home = read_metrics(folder / "metrics.json"), folder.resolve().parent.parent
    if not any(key.startswith("val/") for key in metrics):
        raise ConfigError(
            f"runs: {folder} holds scores at several resolutions; evaluate at one of them (data.eval_size), or leave "
            "it out"
        )
    name, path = metrics["checkpoint"], folder / evaluating.RECORD
    words = tuple(json.loads(path.read_text())["words"]) if path.is_file() else ()
    run = read_run(home) if all((home / name).is_file() for name in FILES) else None
    # One of an earlier version has neither its own configuration nor what it was made with.
    scores = run if run is not None and not path.is_file() else Finished.read(folder, config.flatten, stored)
    labelled = any(key.endswith("/miou") for key in metrics)
    chosen = {"selection/rule": LAST_STEP, "selection/uses_labels": name == "best.ckpt" and labelled}
    settings, environment, place = scores.config, scores.environment, folder
    if run is not None:
        chosen = {key: run.metrics[key] for key in KEPT if key in run.metrics}
        settings = settings | {key: value for key, value in run.config.items() if key.startswith("trainer.")}
        environment, place = run.environment, home
    checkpoints = home / "checkpoints" if (home / "checkpoints").is_dir() else home
    return Finished(place, chosen | metrics, settings, environment, title(metrics), folder, checkpoints / name, words)


def expect_words(run: Finished, words: Sequence[str]) -> None:
    """Raises ConfigError where a run cannot be scored anew with these words."""
    config.restore(stored((run.tables or run.folder) / "config.yaml"), words)


def scored_anew(run: Finished, words: Sequence[str], checkpoint: str | None = None) -> Finished:
    """The run with the scores of its checkpoint under other words, evaluated where that was not done before.

    checkpoint: `last` or `best`; None: the one that its scores are of. Raises LabelfreeError where it cannot be
    evaluated.
    """
    tokens = [f"{key}={value}" for key, value in config.parse_words([*run.words, *words]).items()]
    path = run.read_from if checkpoint is None else run.read_from.with_name(f"{checkpoint}.ckpt")
    folder = evaluating.kept_in(path, tokens)
    if evaluating.is_kept(folder, path, tokens):
        log.info("%s is taken as it is", folder)
    else:
        log.info("%s is scored with %s", path, " ".join(tokens) or "its own settings")
        evaluating.evaluate(path, tokens, folder)
    return read_evaluation(folder)
