"""`run.py train`: from a configuration to a finished run folder."""

import logging
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig

import config
from common import about, distributed
from common.errors import CheckpointError, LabelfreeError
from common.files import cache_folder, copy_whole
from common.names import of_results
from datamodules.base import SegmentationDataModule
from datamodules.folder import expect_apart
from engine import ahead, backbone_file, checkpoints, closing, phases, setup
from engine.callbacks import screen, selection
from engine.callbacks.library_draws import LibraryDraws
from engine.callbacks.panel_keeper import PanelKeeper
from engine.callbacks.preemption import Preemption
from engine.callbacks.progress import TrainingProgress
from engine.callbacks.run_keeper import RunKeeper, numbers
from engine.callbacks.wandb_rows import masked_pictures
from engine.fitting import FCNFit, KMeansFit, OwnFit, PosthocFit, RetrievalFit
from engine.overclustering import OverclusterFit
from engine.records import environment, recipes, summary
from engine.records.metrics_file import FACTS, read_metrics
from engine.records.run_folder import RunFolder, open_run
from engine.stages.stage import Stage, prepare
from evaluation import headline
from evaluation.probes import predicts_clusters
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.staged import StagedSegmenter
from reporting import panels, report

log = logging.getLogger(__name__)

FITS = (KMeansFit, PosthocFit, FCNFit, RetrievalFit, OverclusterFit)
"""What is fitted before a closing evaluation, behind a method's own classes."""


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train, evaluate, write the run folder; returns the content of metrics.json.

    A finished run of the same name and configuration is not trained again: its metrics are returned. Raises
    LabelfreeError with one line for whatever a user has to mend, `Stopped` where a signal asked the run to stop.
    """
    with screen.showing(cfg.trainer.progress):
        return _train(cfg)


def _train(cfg: DictConfig) -> dict[str, Any]:
    commit = environment.git_commit()
    setup.begin()
    ahead.expect_training(cfg)
    cfg, data = setup.build_data(cfg)
    folder = open_run(cfg)
    expect_apart(cfg, **{"run.dir": folder.path.parent, "cache.dir": cache_folder(cfg)})
    if folder.state == "finished":
        log.info("%s is finished; nothing to do (run.overwrite=true trains it again)", folder.path)
        return read_metrics(folder.metrics, FACTS)
    base, begun = cfg, 0
    total = setup.total_steps(cfg, data)
    steps = phases.plan(base, total)
    cfg, data, model = prepared(steps[0], data if len(steps) == 1 else None)
    phases.check(steps, model, data.meta)
    centroids, posthoc = KMeansFit(cfg, data), PosthocFit(cfg, data)
    centroids.check(model)
    posthoc.check()
    FCNFit(cfg, data).check()
    OverclusterFit(cfg, data).check(model)
    keeper = RunKeeper(folder, cfg, selection.choose(cfg, model))
    if folder.checkpoint is not None:
        begun = check_resume(steps, folder, model)
    elif cfg.method.get("init_from") is not None:
        model.take_start(setup.stored_start(cfg))
    folder.create(base)
    pictures = PanelKeeper(cfg.evaluation.panels)
    loggers = [setup.wandb_logger(cfg, folder.path)] if cfg.logger == "wandb" else []
    preemption = Preemption(keeper)
    progress = TrainingProgress(cfg, total)
    callbacks = [keeper, preemption, LibraryDraws(cfg.seed), pictures, progress]
    run_stage(cfg, data, model, preemption, folder)
    trainer = setup.build_trainer(cfg, total, callbacks, loggers, folder.path)
    introduce(cfg, data, model, folder, trainer)
    try:
        with preemption.listening(trainer):
            checkpoint = folder.checkpoint
            for phase in phases.left(steps, begun):
                if phase is not steps[0]:
                    cfg, data, model = prepared(phase)
                    if isinstance(model, StagedSegmenter):
                        model.enter(setup.read_checkpoint(checkpoint))
                    run_stage(cfg, data, model, preemption, folder)
                    log.info("phase %d of %d: steps %d to %d", steps.index(phase) + 1, len(steps), *spanned(phase))
                trainer.fit_loop.epoch_loop.max_steps = phase.last
                trainer.fit(model, data, ckpt_path=checkpoint, weights_only=True)
                checkpoint = folder.last
            if not keeper.history.rows and trainer.is_global_zero:  # killed in the closing evaluation: no step was left
                keeper.restore_history(trainer)
            trainer.callbacks += [OwnFit(), *(fit(cfg, data) for fit in FITS)]
            progress.close(closing_parts(cfg, data))
            metrics = close(cfg, data, model, trainer, keeper, folder, steps)
            metrics |= recipes.published_figures(config.flatten(base))
    except SystemExit:  # what Lightning makes of Ctrl-C
        step = trainer.global_step
        raise KeyboardInterrupt(f"stopped at step {step} of {total}; the same command goes on") from None
    except Exception as error:
        if isinstance(error, LabelfreeError) or not while_restoring(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise CheckpointError(f"run.resume: {checkpoint} cannot be gone on from ({reason}); start without it") from None
    if trainer.is_global_zero:
        for logger in loggers:
            logger.summarise(metrics)
        write_files(model, pictures, folder.path, loggers)
        if model.trains_backbone:
            backbone_file.export_backbone(folder.path, cfg, data, model, metrics)
        seconds, speed = keeper.elapsed(), metrics["train_images_per_second"]
        device, processes = trainer.strategy.root_device, trainer.world_size
        facts = environment.describe(cfg.seed, device, commit, seconds, speed, processes)
        facts["closing_seconds"] = round(progress.closing_seconds(), 1)
        report.write_json(folder.path / "environment.json", facts)
        report.write_json(folder.metrics, metrics)
        folder.previous.unlink(missing_ok=True)  # nothing goes on from here
    return metrics


def run_stage(
    cfg: DictConfig,
    data: SegmentationDataModule,
    model: UnsupervisedSegmenter,
    preemption: Preemption,
    folder: RunFolder,
) -> None:
    """What is missing of a method's offline stage; its results go to the method and its data."""
    if isinstance(model, StagedSegmenter) and model.stage_in_training:
        prepare(Stage(cfg, data, model, preemption), cfg.evaluation.panels, folder.path)


def prepared(
    phase: phases.Phase, data: SegmentationDataModule | None = None
) -> tuple[DictConfig, SegmentationDataModule, UnsupervisedSegmenter]:
    """Settings, pictures and method of a phase, connected. `data`: where they are made already."""
    cfg = phase.cfg
    if data is None:
        cfg, data = setup.build_data(cfg)
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    model.first_step, model.total_steps = phase.first, phase.last
    return cfg, data, model


def spanned(phase: phases.Phase) -> tuple[int, int]:
    """Its first and last step, counted from 1."""
    return phase.first + 1, phase.last


def check_resume(steps: list[phases.Phase], folder: RunFolder, model: UnsupervisedSegmenter) -> int:
    """The step of the checkpoint to go on from.

    Raises CheckpointError where it is cut, foreign, of other settings, of other weights, or at its end.
    """
    checkpoint = setup.read_checkpoint(folder.checkpoint)
    if "imported" in checkpoint["labelfree"]:
        raise CheckpointError(
            f"run.resume: {folder.checkpoint} was imported; a release holds no optimiser, pool or projection to go on "
            "with, so it can be evaluated and used by predict, and training starts without it"
        )
    step, total = checkpoint["global_step"], steps[-1].last
    stored = config.with_defaults(checkpoint["labelfree"]["config"])
    own = config.plain(phases.at(steps, step).cfg)
    for group in ("method", "backbone", "optim"):
        difference = config.first_difference({group: stored[group]}, {group: own[group]})
        if difference is not None:
            raise CheckpointError(
                f"run.resume: {folder.checkpoint} was trained with other settings, first difference {difference}; "
                "give the same words, or start without it"
            )
    lacks = checkpoints.lacking(checkpoint, training=True)
    if lacks is not None:
        raise CheckpointError(f"run.resume: {folder.checkpoint} cannot be gone on from ({lacks}); start without it")
    setup.expect_fit(checkpoint, model, f"run.resume={folder.checkpoint}")
    if folder.state == "new" and step >= total:
        raise CheckpointError(
            f"run.resume: {folder.checkpoint} is at step {step} already; "
            f"set trainer.max_steps above it (now {total}), or use `run.py eval`"
        )
    return step


def while_restoring(error: Exception) -> bool:
    """True where Lightning raised it while it took the state of a checkpoint over."""
    frames = (frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__))
    return any("checkpoint_connector" in code.co_filename and "restore" in code.co_name for code in frames)


def introduce(
    cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter, folder: RunFolder, trainer: L.Trainer
) -> None:
    """Say what is about to run."""
    if not trainer.is_global_zero:
        return
    log.info("%s; run folder %s", about.signature(), folder.path)
    log.info(
        "%s on %s (%d training, %d validation pictures, %s) with %s: %d steps of %d pictures",
        cfg.method.name if model.stands_on is None else f"{cfg.method.name} on codes of {model.stands_on},",
        cfg.data.name, len(data.source("train")), len(data.source("val")),
        f"{data.meta.num_classes} classes" if data.meta.has_labels else "no labels",
        cfg.backbone.name, trainer.max_steps, cfg.data.batch_size,
    )  # fmt: skip
    if cfg.backbone.weights == "bundled" and cfg.data.name != "scenes" and not model.trains_backbone:
        log.warning(
            "backbone=%s: its bundled weights know drawn scenes alone and find little but colours and brightness in "
            "other pictures; name a backbone with weights for them, such as backbone=dino_vits16",
            cfg.backbone.name,
        )
    if model.uses_labels:
        log.info("this variant trains WITH labels; every table says so")
    if folder.state == "resume":
        log.info("going on from %s", folder.checkpoint)


def closing_parts(cfg: DictConfig, data: SegmentationDataModule) -> dict[str, int]:
    """What is done behind the last step, and in how many pieces: batches, and pictures that are drawn."""
    size = cfg.data.eval_batch_size
    codes, seen = min(cfg.evaluation.kmeans.pictures, data.clustered_count()), len(data.source("val"))
    return {"k-means": -(-codes // size), "evaluation": -(-seen // size), "pictures": min(seen, cfg.evaluation.panels)}


def close(
    cfg: DictConfig,
    data: SegmentationDataModule,
    model: UnsupervisedSegmenter,
    trainer: L.Trainer,
    keeper: RunKeeper,
    folder: RunFolder,
    steps: list[phases.Phase],
) -> dict[str, Any]:
    """The closing evaluation: fit the offline probes, validate, put them into last.ckpt, choose the best, and where
    that is another step score it likewise."""
    trainer.validate(model, data, verbose=False)
    final = numbers(trainer.callback_metrics, "val/")
    lost = trainer.is_global_zero and not folder.best.is_file()
    keeper.finish(model.total_steps, final, distributed.anywhere(lost, trainer.strategy.root_device))
    if trainer.is_global_zero:
        closing.keep_fitted(model, folder.last)
        if keeper.best_step == model.total_steps:
            copy_whole(folder.last, folder.best)
        keeper.record(trainer, model.total_steps, final)
    trainer.strategy.barrier()
    scores = best = summary.scores(model, final)
    if keeper.best_step < model.total_steps:
        best = closing.score_best(steps, data, model, trainer, folder.best)
    metrics = scores | keeper.summary(best) | summary.protocol(cfg, data, model)
    metrics |= summary.facts(cfg, model, model.total_steps)
    return {**metrics, "train_images_per_second": keeper.images_per_second()}


def write_files(model: UnsupervisedSegmenter, pictures: PanelKeeper, folder: Path, loggers: list[Any]) -> None:
    """Panels, per-class table, clusters and the confusion figure of the closing evaluation."""
    results = model.validated
    if results:
        report.write_scores(folder, results, model.meta, main=model.main_probe)
        ordered = {probe: results[probe] for probe in headline.first(model.headline, list(results))}
        log.info("%s", report.as_text(report.per_class_table(ordered, model.meta)))
    mappings = {probe: scores.mapping for probe, scores in results.items() if predicts_clusters(probe)}
    rows = [panel_row(model, kept) for kept in pictures.kept.values()]
    marks = panels.CONFIDENCE_MARKS | ({"wrong": panels.WRONG} if any("errors" in row.maps for row in rows) else {})
    groups = [name for item in model.further.values() for name in item.groups]
    names = panel_names([row.title for row in rows])
    for row, name in zip(screen.counted(rows, "pictures", len(rows)), names, strict=True):
        panels.save(folder / "panels" / name, [row], model.meta, mappings, groups=groups, marks=marks)
    if rows:
        panels.save(folder / "panels" / "sheet.png", rows, model.meta, mappings, groups=groups, marks=marks)
        for logger in loggers:
            logger.log_image("panels", [str(folder / "panels" / "sheet.png")])
            known = [
                replace(row, maps={k: v for k, v in row.maps.items() if k not in groups and v.ndim == 2})
                for row in rows
            ]
            logger.log_metrics({"pictures": masked_pictures(known, model.meta, mappings)})
    for logger in loggers:
        if (folder / "confusion.png").is_file():
            logger.log_image("confusion", [str(folder / "confusion.png")])
        logger.finish()
    log.info("panels, tables and checkpoints are in %s", folder)


def panel_names(titles: list[str]) -> list[str]:
    """A file for the panel of each picture: no two are one, nor the sheet of them all or that of pseudo-labels."""
    taken = ["sheet.png", "pseudo_labels.png"]
    files = [f"{title.replace('/', '_')}.png" for title in titles]
    return [f"{name}.png" for name in of_results([*taken, *files])[len(taken) :]]


def panel_row(model: UnsupervisedSegmenter, kept: dict[str, Any]) -> panels.Row:
    """The row of a picture that a PanelKeeper kept: id maps, then confidence and, with labels, errors as pictures."""
    maps = dict(kept["maps"])
    maps["confidence"] = panels.confidence(maps.pop("confidence"))
    scores = model.validated.get(model.main_probe)
    if scores is not None and kept["label"] is not None:
        maps["errors"] = panels.errors(kept["image"], maps[model.main_probe], kept["label"], scores.mapping)
    return panels.Row(kept["image"], maps, kept["label"], kept["id"])
