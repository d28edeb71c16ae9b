"""Runs the offline stage of a method: the steps that are missing, each through a Trainer, and `run.py pseudo`."""

import contextlib
import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from common import chance, distributed
from common.errors import DataError
from common.files import cache_folder, make_output, size_text
from datamodules.folder import expect_apart
from engine import ahead, checkpoints, setup
from engine.callbacks import screen
from engine.callbacks.library_draws import LibraryDraws
from engine.callbacks.preemption import Preemption
from engine.stages.fits import FitBatches, FitKeeper
from engine.stages.maps import (
    MapData,
    MapRunner,
    Meeting,
    OneBatch,
    ReduceRunner,
    ShardWriter,
    agreed,
    everywhere,
    safetensors_bytes,
    share,
)
from engine.stages.panels import write_maps, write_panel
from engine.stages.plan import Plan
from engine.stages.progress import StageProgress
from pseudo_labels import cache
from pseudo_labels.cache import Arrays, Place, Records, Weights
from pseudo_labels.steps import FitStep, MapStep, ReduceStep, Results, Step

log = logging.getLogger(__name__)


@dataclass
class Stage(Plan):
    """A plan, and running what is missing of it."""

    preemption: Preemption | None = None
    """Stops a step at a signal; whole shards stay."""

    def run(self) -> Results:
        """What all steps give; those that are missing are computed first. All processes of a run call it.

        Raises ConfigError, before a step starts, where the disk cannot take it; DiskFullError where it fills up later.
        """
        results: dict[str, Records | Arrays | Weights] = {}
        self._meet()
        for name, step in self.steps.items():
            place = self.places[name]
            if agreed(lambda place=place: place.sound):  # a shared disk may show a file to some of them only
                if rank_zero_only.rank == 0:
                    log.info("pseudo-labels: %s is there (%s)", name, place.path)
            else:
                needed = {need: results[need] for need in step.needs}
                self._compute(step, place, needed)
            if not all(everywhere(place.complete)):
                raise DataError(
                    f"cache.dir={self.root}: {place.path} is not seen by every process; name a folder that all "
                    "machines share"
                )
            kind = Records if isinstance(step, MapStep) else Arrays if isinstance(step, ReduceStep) else Weights
            results[name] = kind(place)
        return results

    def _meet(self) -> None:
        """Start the processes of the run, where it has several and they do not know each other yet."""
        if distributed.active():
            return
        trainer = self._trainer(1, [])
        if trainer.world_size > 1:
            with self._listening(trainer), interrupted():
                trainer.predict(Meeting(), datamodule=OneBatch(), return_predictions=False)

    def _compute(self, step: Step, place: Place, needed: Results) -> None:
        if isinstance(step, FitStep):
            return self._fit(step, place, needed)
        if isinstance(step, MapStep):
            runner, data = MapRunner(step, needed), MapData(self, step, place)
            writer = [ShardWriter(data), StageProgress(self.cfg.trainer.progress, data, step.name)]
        else:
            runner, data, writer = ReduceRunner(step, needed, place), OneBatch(), []
        trainer = self._trainer(1, writer)
        with self._listening(trainer), interrupted():
            trainer.predict(runner, datamodule=data, return_predictions=False)
        if isinstance(step, MapStep):
            self.data.sync_broken()  # each rank has counted its own
        share(runner.error or data.error, trainer.strategy.root_device)
        if isinstance(step, MapStep) and trainer.is_global_zero:
            found = cache.summary(place, data.pictures, self.settings.shard, step.counted)
            place.finish(found)
            log.info("pseudo-labels: %s: %s", step.name, summary_text(found))
        trainer.strategy.barrier()
        return None

    def _fit(self, step: FitStep, place: Place, needed: Results) -> None:
        with chance.library_draws(self.cfg.seed, f"stage.{step.name}.init"):
            module = step.module(needed)
        batches, keeper = FitBatches(self, step, needed), FitKeeper(self, place)
        draws = LibraryDraws(self.cfg.seed, f"stage.{step.name}")
        progress = StageProgress(self.cfg.trainer.progress, batches, step.name)
        trainer = self._trainer(step.steps, [keeper, draws, progress])
        last = keeper.last if agreed(lambda: usable_state(keeper.last)) else None
        with self._listening(trainer), interrupted():
            trainer.fit(module, datamodule=batches, ckpt_path=last, weights_only=True)
        if trainer.is_global_zero:
            state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
            place.finish({"steps": step.steps}, weights=safetensors_bytes(state))
            for path in keeper.last.parent.glob("*.ckpt"):
                path.unlink()
        trainer.strategy.barrier()

    def _trainer(self, steps: int, callbacks: list[Callback]) -> L.Trainer:
        listeners = [] if self.preemption is None else [Listener(self.preemption)]
        return setup.build_trainer(self.cfg, steps, [*callbacks, *listeners], [], self.root)

    def _listening(self, trainer: L.Trainer) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self.preemption is None else self.preemption.listening(trainer)


def usable_state(path: Path) -> bool:
    """Whether a fit step can go on from its own checkpoint; a damaged one is named, and the step begins anew."""
    broken = checkpoints.damage(path) if path.is_file() else None
    if broken is not None:
        log.warning("%s is damaged (%s) and skipped; its step begins anew", path, broken)
    return path.is_file() and broken is None


class Listener(Callback):
    """Lets a run's handlers of signals take the place of Lightning's once a step runs."""

    def __init__(self, preemption: Preemption) -> None:
        self.preemption = preemption

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.preemption.listen()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.preemption.listen()


@contextlib.contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C is what it was, and not what Lightning makes of it."""
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt("stopped; the same command goes on with what is missing") from None


def prepare(stage: Stage, panels: int, folder: Path | None = None) -> Results:
    """Run what is missing, and let the method take it; a panel and the summaries go into `folder` (a run's)."""
    results = stage.run()
    stage.model.stage_name = stage.name
    stage.model.staged(results, stage.data)
    if rank_zero_only.rank == 0:
        facts = {name: describe(place) for name, place in stage.places.items()}
        if folder is not None:
            cache.put(folder / f"{stage.model.stage_files}.json", json.dumps(facts, indent=2).encode())
        views = stage.model.shown(results)
        if views and panels:
            target = (folder / "panels" if folder is not None else stage.root) / f"{stage.model.stage_files}.png"
            if folder is None:
                make_output(stage.root)
            write_panel(target, stage.data, views, panels)
            log.info("pseudo-labels: pictures of them are in %s", target)
    return results


def describe(place: Place) -> dict[str, Any]:
    """What the manifest of a step says, for people."""
    hidden = ("inputs", "format", "sums")
    return {"folder": str(place.path), **{key: v for key, v in place.manifest().items() if key not in hidden}}


def summary_text(found: dict[str, Any]) -> str:
    """One line: kept, dropped and why, regions per picture, size on disk."""
    reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(found["dropped"].items()))
    regions = found.get("regions")
    parts = [
        f"{found['kept']} of {found['pictures']} pictures kept",
        f"dropped: {reasons}" if reasons else "none dropped",
        *([f"{regions['mean']:.1f} regions a picture ({regions['least']} to {regions['most']})"] if regions else []),
        size_text(found["bytes"]),
    ]
    return "; ".join(parts)


def pseudo(cfg: DictConfig, output: Path | None = None) -> dict[str, Any]:
    """`run.py pseudo`: the offline stage of a method alone; returns the summaries by step.

    output: folder for label maps of the training pictures, `<column of the panel>/<id>.png`, at the pictures' size (0
    background where the method has one, clusters, 255 = no label). Raises ConfigError for a method without a stage.
    """
    ahead.expect_stage(cfg)
    setup.begin()
    cfg, data = setup.build_data(cfg)
    model = setup.build_model(cfg, data.meta)
    expect_apart(cfg, output=output, **{"cache.dir": cache_folder(cfg)})
    setup.connect(model, data)
    stage = Stage(cfg, data, model)
    with screen.showing(cfg.trainer.progress):
        results = prepare(stage, cfg.evaluation.panels)
    if output is not None and rank_zero_only.rank == 0:
        make_output(output)
        for name, view in model.shown(results).items():
            write_maps(output / name.replace(": ", "_"), view)
    return {name: describe(place) for name, place in stage.places.items()}
