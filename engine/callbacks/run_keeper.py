"""What happens beside training: checkpoints, the history, the choice of the best, panels."""

import logging
import math
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from common import distributed
from common.errors import TrainingError
from engine.callbacks.selection import Selection
from engine.records.run_folder import History, RunFolder

log = logging.getLogger(__name__)


class RunKeeper(Callback):
    """Writes metrics.csv and checkpoints/{last,best}.ckpt, and remembers the best scores.

    A step that is validated is saved after its validation, so a resumed run has all of it or none of it.
    """

    def __init__(self, folder: RunFolder, cfg: Any, select: Selection) -> None:
        self.folder = folder
        self.settings = cfg.trainer
        self.select = select
        self.apart = bool(cfg.evaluation.flip and select.keys)
        """The closing evaluation reads codes otherwise than those that choose the best: the last step has both."""
        self.history = History(folder.path / "metrics.csv")
        self.best: dict[str, float] = {}
        self.best_step = 0
        self.seconds = 0.0
        self.timed_pictures = 0
        self._started, self._before = time.perf_counter(), 0.0
        self._mark: float | None = None
        self._of_history: int | None = None

    # -------------------------------------------------- state that a checkpoint carries

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "best_step": self.best_step,
            "seconds": self.seconds,
            "timed_pictures": self.timed_pictures,
            "elapsed": self.elapsed(),
            "history": self.history.sum,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self.seconds, self.timed_pictures = state["seconds"], state["timed_pictures"]
        self._before, self._of_history = state["elapsed"], state.get("history")

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.folder.damaged or self.folder.stands_in:
            trainer.strategy.barrier()  # every rank has found its checkpoint, and read it
            if trainer.is_global_zero:
                self.folder.mend()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.folder.best.is_file():  # going on in a new folder: the best so far lies elsewhere
            self.best, self.best_step = {}, 0
        if trainer.is_global_zero:
            self.restore_history(trainer)
        self._mark = None  # the first step is not timed: it waits for the method's preparation

    def restore_history(self, trainer: L.Trainer) -> None:
        """metrics.csv and the W&B run as they were at this step."""
        self.history.restore(trainer.global_step, closing=trainer.global_step >= trainer.max_steps)
        if self.folder.state == "resume" and self._of_history not in (None, self.history.sum):
            log.warning(
                "%s is not what the run had written by step %d; its rows are taken as they are",
                self.history.path, trainer.global_step,
            )  # fmt: skip
        for row in self.history.rows:
            for logger in trainer.loggers:
                logger.add(int(row["step"]), {key: value for key, value in row.items() if key != "step"})

    def record(self, trainer: L.Trainer, step: int, values: dict[str, float]) -> None:
        """A row of metrics.csv, and of the W&B run."""
        self.history.add(step, values)
        for logger in trainer.loggers:
            logger.add(step, values)

    # -------------------------------------------------- training

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, last = trainer.global_step, trainer.global_step >= pl_module.total_steps
        now = time.perf_counter()
        if self._mark is not None:
            self.seconds += now - self._mark
            self.timed_pictures += pl_module.cfg.data.batch_size
        logged, validated = step % self.settings.log_every == 0, self.validates(step, last)
        saved = not validated and (step % self.settings.checkpoint_every == 0 or last)
        if last:  # the validation of this step alone, where there is one: the closing evaluation follows at once
            trainer.val_check_batch = step if validated else step + 1
        if logged or validated or saved:
            self.expect_finite(trainer)
        if trainer.is_global_zero and logged:
            self.record(trainer, step, numbers(trainer.callback_metrics, "train/"))
        if saved:
            trainer.save_checkpoint(self.folder.last, weights_only=False)
        self._mark = None if validated else time.perf_counter()

    def validates(self, step: int, last: bool) -> bool:
        """True where a validation follows this step (the closing evaluation is not one), and saves it afterwards."""
        return self.apart if last else step % self.settings.val_every == 0

    def expect_finite(self, trainer: L.Trainer) -> None:
        """Raises TrainingError, on every rank, where a trained weight is NaN or infinite: before anything is written.

        Weights are looked at, not the loss: under 16-mixed a loss may overflow in a step that is then left out.
        """
        groups = trainer.optimizers[0].param_groups
        norms = [torch.nn.utils.get_total_norm([p.detach() for p in group["params"]]) for group in groups]
        finite = torch.stack(norms).isfinite().tolist()  # waits for the device once
        broken = sorted({group["name"] for group, good in zip(groups, finite, strict=True) if not good})
        if distributed.anywhere(bool(broken), trainer.strategy.root_device):
            loss = float(trainer.callback_metrics.get("train/loss", math.nan))
            raise TrainingError(
                f"step {trainer.global_step}: weights of {', '.join(broken) or 'another rank'} are not finite "
                f"(train/loss {loss:.4g}); checkpoints are as they were before. Lower optim.{(broken or ['*'])[0]}.lr, "
                "set its clip_norm, or try trainer.precision=32-true"
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        values = numbers(trainer.callback_metrics, "val/")
        if trainer.is_global_zero and trainer.global_step < trainer.max_steps:  # the closing evaluation has a row
            self.record(trainer, trainer.global_step, values)
        if self.offer(trainer.global_step, values):
            trainer.save_checkpoint(self.folder.best, weights_only=False)
        trainer.save_checkpoint(self.folder.last, weights_only=False)
        self._mark = time.perf_counter()

    def offer(self, step: int, values: dict[str, float]) -> bool:
        """Take these scores as the best if they are (a tie goes to the later step); True if so."""
        new, old = self.select.value(values), self.select.value(self.best) if self.best else None
        if new is None or (old is not None and new < old):
            return False
        self.best, self.best_step = dict(values), step
        return True

    def finish(self, step: int, values: dict[str, float], lost: bool = False) -> bool:
        """`offer` for the closing evaluation. Where no validation had the scores of the rule, as without a labelled
        validation pixel, the last step is the best, and the rule says so. `lost`: best.ckpt is gone, so that no other
        step can be the best any more."""
        if self.best and self.apart and not lost:
            return False
        if self.offer(step, values):
            return True
        if self.best and not lost:
            return False
        if not self.best:
            self.select = Selection()
        self.best, self.best_step = dict(values), step
        return True

    def summary(self, best: dict[str, Any]) -> dict[str, Any]:
        """`best/*` and `selection/*` of metrics.json. best: `val/*` of that checkpoint by the closing evaluation."""
        scores = {f"best/{key.removeprefix('val/')}": value for key, value in best.items()}
        chosen = {"selection/rule": self.select.rule, "selection/uses_labels": self.select.uses_labels}
        return {**scores, "best/step": self.best_step, **chosen}

    def elapsed(self) -> float:
        """Seconds of the run, with those of the processes before that were stopped, up to what they saved."""
        return self._before + time.perf_counter() - self._started

    def images_per_second(self) -> float | None:
        """Training pictures per second over all devices, waiting for data included, evaluation and writing excluded."""
        return self.timed_pictures / self.seconds if self.seconds else None


def numbers(metrics: dict[str, Any], prefix: str) -> dict[str, float]:
    """The logged values under a prefix as plain finite numbers."""
    values = {key: float(value) for key, value in metrics.items() if key.startswith(prefix)}
    return {key: value for key, value in values.items() if math.isfinite(value)}
