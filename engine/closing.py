"""The end of a run: what its evaluation fitted goes into its checkpoints, and the best one is scored like the last.

A published figure is that of the best checkpoint, with every read-out (CRF, mirrored picture, k-means). While a run
trains it knows the scores of a few read-outs alone, so the best checkpoint is evaluated once more when the run ends.
"""

import logging
from pathlib import Path
from typing import Any

import lightning as L

import config
from datamodules.base import SegmentationDataModule
from engine import phases, setup
from engine.callbacks import screen
from engine.callbacks.panel_keeper import PanelKeeper
from engine.callbacks.run_keeper import numbers
from engine.checkpoints import WholeCheckpointIO
from engine.records import summary
from evaluation.probes import predicts_clusters
from lightning_modules.base import UnsupervisedSegmenter

log = logging.getLogger(__name__)


def keep_fitted(model: UnsupervisedSegmenter, path: Path) -> None:
    """Put into a checkpoint what was fitted to its codes: k-means centroids, post-hoc probe, and the class of each
    cluster by the labels, which `predict` colours with."""
    checkpoint = setup.read_checkpoint(path)
    checkpoint["state_dict"] |= {name: value.cpu() for name, value in model.offline_state().items()}
    mapped = {name: item.mapping.tolist() for name, item in model.validated.items() if predicts_clusters(name)}
    checkpoint["labelfree"]["clusters"] = mapped
    WholeCheckpointIO().save_checkpoint(checkpoint, path)


def score_best(
    steps: list[phases.Phase],
    data: SegmentationDataModule,
    last: UnsupervisedSegmenter,
    trainer: L.Trainer,
    path: Path,
) -> dict[str, Any]:
    """`val/*` of the best checkpoint by the closing evaluation, which is that of the last one; a collective.

    steps: phases of the run; the checkpoint is of the settings of one of them. last: the trained method, left as it is.
    """
    checkpoint = setup.read_checkpoint(path)
    step = int(checkpoint["global_step"])
    if trainer.is_global_zero:
        log.info("the best checkpoint, step %d, is scored with all read-outs too", step)
    clusters = {"method.num_clusters": last.cfg.method.num_clusters}
    model = setup.restore_model(checkpoint, config.changed(phases.at(steps, step).cfg, clusters), data.meta)
    model.kept_features = last.kept_features
    callbacks = trainer.callbacks
    trainer.callbacks = [item for item in callbacks if not isinstance(item, PanelKeeper)]  # pictures are of the last
    try:
        with screen.within("best checkpoint"):
            trainer.validate(model, data, verbose=False)
    finally:
        trainer.callbacks = callbacks
    if trainer.is_global_zero:
        keep_fitted(model, path)
    trainer.strategy.barrier()
    return summary.scores(model, numbers(trainer.callback_metrics, "val/"))
