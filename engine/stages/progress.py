"""How far an offline stage is: pictures done, pictures per second, and what is left."""

import logging
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from common import distributed
from engine.callbacks import screen
from engine.callbacks.screen import clock, progress_mode

log = logging.getLogger(__name__)

EVERY = 15.0
"""Seconds between two lines where there is no bar."""


class StageProgress(Callback):
    """The bar of the screen in a terminal, a line now and then elsewhere; `mode` is `trainer.progress`.

    data: has `todo`, the pictures over all ranks. Rank 0 tells; the others are taken to be as far as it is.
    """

    def __init__(self, mode: str, data: Any, name: str) -> None:
        self.mode = progress_mode(mode)
        self.data = data
        self.name = name
        self.started = self.said = 0.0
        self.done = 0

    @property
    def speed(self) -> float:
        """Pictures per second over all ranks, reading included."""
        return self.done / max(1e-9, time.perf_counter() - self.started)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.started = self.said = time.perf_counter()
        if (shown := screen.current()) is not None:
            shown.bar(f"pseudo-labels: {self.name}", self.data.todo)

    def on_predict_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        self.done = min(self.done + len(batch["id"]) * distributed.world_size(), self.data.todo)
        if not trainer.is_global_zero or self.mode == "none":
            return
        left = clock((self.data.todo - self.done) / max(1e-9, self.speed))
        if (shown := screen.current()) is not None:
            shown.update(done=self.done, text=f"{self.speed:.1f} pictures/s", left=f"about {left} left")
        elif self.mode == "lines" and time.perf_counter() - self.said > EVERY:
            self.said = time.perf_counter()
            log.info("%d of %d pictures, %.1f pictures/s, about %s left", self.done, self.data.todo, self.speed, left)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.mode != "none" and self.done:
            log.info("%d pictures, %.1f pictures/s", self.done, self.speed)

    on_train_start, on_train_batch_end, on_train_end = on_predict_start, on_predict_batch_end, on_predict_end
