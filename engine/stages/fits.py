"""Fit steps of an offline stage inside a Trainer: their batches, and how a killed one goes on."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from common import distributed
from common.errors import ConfigError
from datamodules.base import sampling
from engine.stages.plan import Plan
from pseudo_labels.cache import Place
from pseudo_labels.steps import FitStep, Results


class FitBatches(L.LightningDataModule):
    """Keyed batches of training pictures with the step's view, never with a label."""

    def __init__(self, stage: Plan, step: FitStep, results: Results) -> None:
        super().__init__()
        self.stage, self.step, self.view = stage, step, step.view(results)
        self.todo = step.steps * step.batch_size

    def train_dataloader(self) -> Any:
        world, data, size = distributed.world_size(), self.stage.data, self.step.batch_size
        pictures = len(data.source("train")) * self.step.geometry().crops
        if size % world or size > pictures:
            raise ConfigError(
                f"step {self.step.name}: a batch of {size} pictures must be a multiple of the {world} devices and at "
                f"most the {pictures} training pictures"
            )
        order = sampling.TrainBatches(
            length=pictures, steps_per_epoch=pictures // size, batch_size=size, rank=distributed.rank(),
            world_size=world, seed=int(self.stage.cfg.seed), start=lambda: self.trainer.global_step,
        )  # fmt: skip
        return data.batches("train", self.step.geometry(), order, f"stage.{self.step.name}", pseudo=self.view)


class FitKeeper(Callback):
    """Saves a fit step now and then."""

    def __init__(self, stage: Plan, place: Place) -> None:
        self.every, self.last = stage.cfg.trainer.checkpoint_every, place.path / "last.ckpt"

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0:
            trainer.save_checkpoint(self.last, weights_only=False)
