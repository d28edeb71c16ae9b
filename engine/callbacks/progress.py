"""How far a run is: a bar in a terminal, lines elsewhere, and a small file for the process that started it."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from engine.callbacks import screen
from engine.callbacks.screen import CLOSING_VARIABLE, FILE_VARIABLE, clock, progress_mode
from evaluation import headline

log = logging.getLogger(__name__)

LINES = 20
"""Lines of a run where there is no bar."""
EVERY = 1.0
"""Seconds between two versions of that file, at least."""


class Pace:
    """Seconds of a step and of a validation, and what is left of a run with them."""

    def __init__(self, total: int, val_every: int) -> None:
        self.total, self.val_every = total, val_every
        self.steps = 0
        self.seconds = 0.0
        self.validation = 0.0
        self.expected = float(os.environ.get(CLOSING_VARIABLE) or 0.0)
        self._mark: float | None = None

    def begin(self) -> None:
        """A step begins; the time since the last one ended is its own, where nothing else was done."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def end(self) -> None:
        """A step has ended."""
        now = time.perf_counter()
        if self._mark is not None:
            self.seconds += now - self._mark
            self.steps += 1
        self._mark = now

    def pause(self) -> None:
        """Something else than steps begins."""
        self._mark = None

    @property
    def step(self) -> float:
        """Seconds of a step."""
        return self.seconds / max(1, self.steps)

    @property
    def closing(self) -> float:
        """Seconds of the closing work: as earlier runs had it, else at least that of a validation."""
        return self.expected or self.validation

    def left(self, step: int) -> float:
        """Seconds of the steps, validations and closing work that are left."""
        validations = (self.total - 1) // self.val_every - step // self.val_every
        return self.step * (self.total - step) + self.validation * max(0, validations) + self.closing


class TrainingProgress(Callback):
    """Shows how far a training is. `cfg`: its settings; `total`: its steps, all phases together."""

    def __init__(self, cfg: Any, total: int) -> None:
        self.mode = progress_mode(cfg.trainer.progress)
        self.log_every = cfg.trainer.log_every
        self.total = total
        self.pace = Pace(total, cfg.trainer.val_every)
        self.loss, self.scores = "", ""
        self._validating = 0.0
        self._closing = 0.0
        self._file = os.environ.get(FILE_VARIABLE)
        self._said = 0.0

    # -------------------------------------------------- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if (shown := screen.current()) is not None:
            shown.bar("training", self.total, trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.pace.begin()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.pace.end()
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        if step % self.log_every == 0 and self.mode == "bar":  # as in metrics.csv; reading it waits for the device
            name, loss = shown_loss(trainer.callback_metrics)
            self.loss = "" if math.isnan(loss) else f"{name} {loss:.4f}"
        self.show(step)
        self.tell("training", step)
        if self.mode == "lines" and (step % max(1, self.total // LINES) == 0 or step == self.total):
            (name, loss), left = shown_loss(trainer.callback_metrics), clock(self.pace.left(step))
            log.info("step %d/%d  %s %.4f  %.2f s/step  about %s left", step, self.total, name, loss,
                     self.pace.step, left)  # fmt: skip

    def show(self, step: int) -> None:
        """Put the step into the bar."""
        if (shown := screen.current()) is not None:
            text = "  ".join(text for text in (self.loss, self.scores) if text)
            shown.update("training", step, text, f"about {clock(self.pace.left(step))} left")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace.pause()

    # -------------------------------------------------- validations and the closing work

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.pace.pause()
        self._validating = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        shown, count = screen.current(), batches(trainer)
        if shown is not None and trainer.state.fn == "fit":
            shown.update(f"validation {batch_idx + 1}/{count}")
        elif shown is not None:
            shown.items("evaluation", batch_idx + 1, count)
        if trainer.is_global_zero:
            self.tell("closing" if self._closing else "training", trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        if trainer.state.fn == "fit":
            self.pace.validation = time.perf_counter() - self._validating
        values = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        values = {key: value for key, value in values.items() if math.isfinite(value)}
        lead = f"val/{pl_module.headline}/"
        ordered = sorted(values.items(), key=lambda item: not item[0].startswith(lead))
        texts = [f"{name[4:]} {value:.1f}" for name, value in ordered if name.endswith(("acc", "miou", "entropy"))]
        key = headline.key_of({**values, "headline": pl_module.headline})
        self.scores = "" if key is None else scored(key, values[key])
        if self.mode != "none":
            log.info("validation at step %d: %s", reached(trainer, pl_module), "  ".join(texts))
        if trainer.state.fn == "fit":
            self.show(trainer.global_step)

    def close(self, parts: dict[str, int]) -> None:
        """The steps are over; the closing work has these parts, with so many pieces each."""
        self._closing = time.perf_counter()
        if (shown := screen.current()) is not None:
            shown.plan("closing", parts)
            shown.update(text=self.scores)
        self.tell("closing", self.total, now=True)

    def closing_seconds(self) -> float:
        """How long the closing work has taken so far."""
        return time.perf_counter() - self._closing

    def tell(self, what: str, step: int, now: bool = False) -> None:
        """Write the file of FILE_VARIABLE, where it is wanted."""
        if self._file is None or not (now or time.perf_counter() - self._said > EVERY):
            return
        self._said = time.perf_counter()
        closing = self.pace.closing - (self._said - self._closing)
        left = max(0.0, closing) if self._closing else self.pace.left(step)
        state = {"what": what, "step": step, "steps": self.total, "left": left, "scores": self.scores}
        temporary = Path(f"{self._file}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(state))
            temporary.replace(self._file)
        except OSError:  # a full disk is said by what matters
            self._file = None


def scored(key: str, value: float) -> str:
    """`cluster 20.3 mIoU` of `val/cluster/miou`."""
    _, probe, name = key.split("/")
    return f"{probe} {value:.1f} {headline.SHOWN.get(name, name)}"


def batches(trainer: L.Trainer) -> int:
    """Batches of a validation."""
    return int(sum(trainer.num_val_batches))


def reached(trainer: L.Trainer, model: L.LightningModule) -> int:
    """The step that the weights are of: that of the checkpoint where they come from one, in `eval`."""
    return trainer.global_step if model.restored_step is None else model.restored_step


def shown_loss(metrics: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value of the loss that lines and bars show, both as metrics.csv has them under train/: the method's;
    the cluster probe's where the method trains nothing."""
    name = "loss" if "train/loss" in metrics else "cluster_probe"
    return name, float(metrics.get(f"train/{name}", math.nan))
