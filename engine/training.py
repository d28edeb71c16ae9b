"""`run.py train`: from a configuration to a finished run folder."""

import json
import logging
import time
from typing import Any

import lightning as L
import torch
from omegaconf import DictConfig
from torch.nn import functional as F

import config
from common import chance
from common.errors import CheckpointError, ConfigError
from datamodules.base import SegmentationDataModule
from engine import environment, setup
from engine.callbacks import PanelKeeper, RunKeeper, WholeCheckpointIO, numbers, progress
from engine.run_folder import RunFolder, copy_whole, open_run
from evaluation import panels, readout, report
from lightning_modules.base import UnsupervisedSegmenter
from retrieval import kmeans

log = logging.getLogger(__name__)


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train, evaluate, write the run folder; returns the content of metrics.json.

    A finished run of the same name and configuration is not trained again: its metrics are returned. Raises
    LabelfreeError with one line for whatever a user has to mend.
    """
    started, commit = time.perf_counter(), environment.git_commit()
    setup.begin()
    cfg, data = setup.build_data(cfg)
    folder = open_run(cfg)
    if folder.state == "finished":
        log.info("%s is finished; nothing to do (run.overwrite=true trains it again)", folder.path)
        return json.loads(folder.metrics.read_text())
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    keeper = RunKeeper(folder, cfg, selection_key(cfg, model))
    if folder.checkpoint is not None:
        check_resume(cfg, model, folder)
    folder.create(cfg)
    pictures = PanelKeeper(cfg.evaluation.panels)
    loggers = [setup.wandb_logger(cfg, folder.path)] if cfg.logger == "wandb" else []
    callbacks = [keeper, pictures, *progress(cfg.trainer.progress)]
    trainer = setup.build_trainer(cfg, model.total_steps, callbacks, loggers, folder.path)
    introduce(cfg, data, model, folder, trainer)
    try:
        trainer.fit(model, data, ckpt_path=folder.checkpoint, weights_only=True)
    except SystemExit:  # what Lightning makes of Ctrl-C
        log.info("stopped at step %d of %d; the same command goes on", trainer.global_step, model.total_steps)
        raise KeyboardInterrupt from None
    if not keeper.history.rows and trainer.is_global_zero:  # killed in the closing evaluation: nothing was trained now
        keeper.history.restore(trainer.global_step)
    metrics = close(cfg, data, model, trainer, keeper, folder)
    if trainer.is_global_zero:
        write_files(model, pictures, folder, loggers)
        seconds, speed = time.perf_counter() - started, metrics["train_images_per_second"]
        facts = environment.describe(cfg.seed, trainer.strategy.root_device, commit, seconds, speed)
        report.write_json(folder.path / "environment.json", facts)
        report.write_json(folder.metrics, metrics)
    return metrics


def check_resume(cfg: DictConfig, model: UnsupervisedSegmenter, folder: RunFolder) -> None:
    """Raises CheckpointError where the checkpoint to go on from is cut, foreign, of other settings, or at its end."""
    checkpoint = setup.read_checkpoint(folder.checkpoint)
    stored, own = checkpoint["labelfree"]["config"], config.plain(cfg)
    for group in ("method", "backbone", "optim"):
        difference = config.first_difference({group: stored[group]}, {group: own[group]})
        if difference is not None:
            raise CheckpointError(
                f"run.resume: {folder.checkpoint} was trained with other settings, first difference {difference}; "
                "give the same words, or start without it"
            )
    if folder.state == "new" and checkpoint["global_step"] >= model.total_steps:
        raise CheckpointError(
            f"run.resume: {folder.checkpoint} is at step {checkpoint['global_step']} already; "
            f"set trainer.max_steps above it (now {model.total_steps}), or use `run.py eval`"
        )


def selection_key(cfg: DictConfig, model: UnsupervisedSegmenter) -> str:
    """The score that chooses best.ckpt; without labels none does, and the last checkpoint is the best.

    Raises ConfigError for a score that validation during training does not have (val/kmeans/* comes at the end).
    """
    if cfg.evaluation.select == "auto":
        return "val/cluster/miou" if model.meta.has_labels else ""
    probes = [probe for probe in model.probe_names() if probe != "kmeans"] if model.meta.has_labels else []
    known = [f"val/{probe}/{name}" for probe in probes for name in ("acc", "miou")]
    known += ["val/cluster/entropy", "val/cluster/confidence"]
    if cfg.evaluation.select not in known:
        raise ConfigError(f"evaluation.select={cfg.evaluation.select}: expected auto or one of {', '.join(known)}")
    return cfg.evaluation.select


def introduce(
    cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter, folder: RunFolder, trainer: L.Trainer
) -> None:
    """Say what is about to run."""
    if not trainer.is_global_zero:
        return
    log.info("run folder %s", folder.path)
    log.info(
        "%s on %s (%d training, %d validation pictures, %s) with %s: %d steps of %d pictures",
        cfg.method.name, cfg.data.name, len(data.source("train")), len(data.source("val")),
        f"{data.meta.num_classes} classes" if data.meta.has_labels else "no labels",
        cfg.backbone.name, model.total_steps, cfg.data.batch_size,
    )  # fmt: skip
    if model.uses_labels:
        log.info("this variant trains WITH labels; every table says so")
    if folder.state == "resume":
        log.info("going on from %s", folder.checkpoint)


def close(
    cfg: DictConfig,
    data: SegmentationDataModule,
    model: UnsupervisedSegmenter,
    trainer: L.Trainer,
    keeper: RunKeeper,
    folder: RunFolder,
) -> dict[str, Any]:
    """The closing evaluation: fit the k-means probe, validate, put its centroids into last.ckpt, choose the best."""
    fit = KMeansFit(cfg, data)
    trainer.callbacks.append(fit)
    trainer.validate(model, data, verbose=False)
    final = numbers(trainer.callback_metrics, "val/")
    improved = keeper.offer(model.total_steps, final)
    if trainer.is_global_zero:
        checkpoint = setup.read_checkpoint(folder.last)
        for name, value in model.kmeans_probe.state_dict(prefix="kmeans_probe.").items():
            checkpoint["state_dict"][name] = value.cpu()
        mapped = {probe: scores.mapping.tolist() for probe, scores in model.validated.items() if clusters(probe)}
        checkpoint["labelfree"]["clusters"] = mapped  # cluster -> class by the labels; `predict` colours with it
        WholeCheckpointIO().save_checkpoint(checkpoint, folder.last)
        if improved or not folder.best.is_file():
            copy_whole(folder.last, folder.best)
        keeper.history.add(model.total_steps, final)
    trainer.strategy.barrier()
    return collect_metrics(cfg, data, model, keeper, final)


def clusters(probe: str) -> bool:
    """Whether a read-out predicts clusters, which become classes by matching, or classes at once."""
    return not probe.startswith("linear")


def collect_metrics(
    cfg: DictConfig,
    data: SegmentationDataModule,
    model: UnsupervisedSegmenter,
    keeper: RunKeeper,
    final: dict[str, float],
) -> dict[str, Any]:
    """The flat content of metrics.json. Scores in percent; null where there is none."""
    metrics: dict[str, Any] = {
        f"val/{probe}/{name}": final.get(f"val/{probe}/{name}") for probe in model.validated for name in ("acc", "miou")
    }
    metrics |= {f"val/cluster/{name}": final.get(f"val/cluster/{name}") for name in ("entropy", "confidence")}
    metrics |= {f"best/{key.removeprefix('val/')}": value for key, value in keeper.best.items()}
    labels = bool(keeper.select) and keeper.select.rsplit("/", 1)[-1] in ("acc", "miou")
    metrics |= {
        "best/step": keeper.best_step,
        "selection/rule": f"highest {keeper.select}" if keeper.select else "last step",
        "selection/uses_labels": labels,
        "protocol/crop": cfg.data.eval_crop,
        "protocol/resolution": str(cfg.data.eval_size),
        "protocol/interpolation": cfg.data.interpolation,
        "protocol/crf": model.crf is not None and str(model.crf.constants),
        "protocol/flip": cfg.evaluation.flip,
        "protocol/matching": f"{cfg.evaluation.matching}, extra {cfg.evaluation.extra}, absent {cfg.evaluation.absent}",
        "protocol/list": f"val: {len(data.source('val'))} pictures",
        "method": cfg.method.name,
        "uses_labels": model.uses_labels,
        "data": cfg.data.name,
        "backbone": cfg.backbone.name,
        "seed": cfg.seed,
        "steps": model.total_steps,
        "train_images_per_second": keeper.images_per_second(cfg.data.batch_size),
    }
    return report.plain(metrics)


class KMeansFit(L.Callback):
    """Fits the k-means probe on codes of the training pictures, on the device, before an evaluation that needs it."""

    def __init__(self, cfg: DictConfig, data: SegmentationDataModule) -> None:
        self.cfg = cfg
        self.data = data

    def on_validation_start(self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter) -> None:
        if pl_module.kmeans_probe.fitted:
            return
        settings = self.cfg.evaluation.kmeans
        codes = self.training_codes(trainer, pl_module, settings.pictures, settings.points)
        result = kmeans.fit_distributed(
            codes,
            self.cfg.method.num_clusters,
            spherical=True,
            seed=self.cfg.seed,
            iterations=settings.iterations,
            restarts=settings.restarts,
            init=settings.init,
        )
        pl_module.kmeans_probe.set(result.centroids)

    @torch.no_grad()
    def training_codes(
        self, trainer: L.Trainer, pl_module: UnsupervisedSegmenter, pictures: int, points: int
    ) -> torch.Tensor:
        """Unit codes of this rank's part of the chosen training pictures, [n,D]: all patches, or as many of each."""
        rows = []
        loader = self.data.loader("train", geometry="eval", order="shuffled", limit=pictures, purpose="kmeans")
        total = min(pictures, len(loader.dataset))
        for batch in loader:
            images = batch["image"].to(pl_module.device)
            with trainer.precision_plugin.forward_context():
                codes = pl_module.embed(pl_module.features(images)).float()
            patches = F.normalize(codes.flatten(2), dim=1).transpose(1, 2)
            inside = readout.valid_patches(batch["valid"], codes.shape[-2:]).flatten(1)
            share = max(1, points // total)
            for index, picture, valid in zip(batch["index"].tolist(), patches, inside, strict=True):
                picture = picture[valid.to(picture.device)]
                if len(picture) > share:
                    order = torch.randperm(
                        len(picture), generator=chance.generator(self.cfg.seed, "kmeans.points", index)
                    )
                    picture = picture[order[:share].to(picture.device)]
                rows.append(picture)
        return torch.cat(rows) if rows else torch.empty(0, pl_module.code_dim, device=pl_module.device)


def write_files(model: UnsupervisedSegmenter, pictures: PanelKeeper, folder: RunFolder, loggers: list[Any]) -> None:
    """Panels, per-class table, clusters and the confusion figure of the closing evaluation."""
    results = model.validated
    if results:
        report.write_scores(folder.path, results, model.meta, main="cluster" if model.trains else "kmeans")
        log.info("%s", report.as_text(report.per_class_table(results, model.meta)))
    mappings = {probe: scores.mapping for probe, scores in results.items() if clusters(probe)}
    rows = [panels.Row(kept["image"], kept["maps"], kept["label"], kept["id"]) for kept in pictures.kept.values()]
    for row in rows:
        panels.save(folder.path / "panels" / f"{row.title.replace('/', '_')}.png", [row], model.meta, mappings)
    if rows:
        panels.save(folder.path / "panels" / "sheet.png", rows, model.meta, mappings)
        for logger in loggers:
            logger.log_image("panels", [str(folder.path / "panels" / "sheet.png")])
    log.info("panels, tables and checkpoints are in %s", folder.path)
