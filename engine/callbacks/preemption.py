"""A scheduler asks a run to stop: the state is saved, and the same command goes on from there.

SIGUSR1 means "your time is up, come back" (SLURM sends it some seconds before a time limit, see launch/slurm.sbatch),
SIGTERM means "stop". Both are remembered until the step that runs is whole; all ranks then stop after the same step.
Lightning's own SIGUSR1 handler is not used: it saves inside the handler, in the middle of a step, each rank by itself.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from common import distributed
from common.errors import Stopped
from engine.callbacks.run_keeper import RunKeeper

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

MARKER_VARIABLE = "LABELFREE_REQUEUE"
"""Names the file that a rank makes when it is asked to stop; the batch script then requeues the job."""


class Preemption(Callback):
    """Stops a run that got SIGUSR1 or SIGTERM. Comes after `RunKeeper` in the list of callbacks.

    Inside training steps the signal waits for the end of the step: all ranks agree, save, and stop. In preparation and
    in evaluations, which change no weight, the process stops at once. A step that is due to be validated is not saved
    before its validation (a resumed run has all of it or none), so such a step is done again.
    """

    def __init__(self, keeper: RunKeeper) -> None:
        self.keeper = keeper
        self.signum = 0
        self.training = False
        self.trainer: L.Trainer | None = None

    @contextmanager
    def listening(self, trainer: L.Trainer) -> Iterator[None]:
        """Handle the signals from here on, and put the former handlers back at the end."""
        self.trainer = trainer
        former = {signum: signal.getsignal(signum) for signum in SIGNALS}
        self.listen()
        try:
            yield
        finally:
            if in_main_thread():
                for signum, handler in former.items():
                    signal.signal(signum, handler)

    def listen(self) -> None:
        """Lightning puts its own handlers in place whenever a loop starts; ours take theirs."""
        if in_main_thread():
            for signum in SIGNALS:
                signal.signal(signum, self.receive)

    def receive(self, signum: int, frame: Any) -> None:
        """The handler. A second signal changes nothing: the run is stopping."""
        if self.signum:
            return
        self.signum = signum
        launcher = self.trainer.strategy.launcher
        if launcher is not None:  # processes that Lightning started itself: the scheduler does not know them
            launcher.kill(signum)
        marker = os.environ.get(MARKER_VARIABLE)
        if marker:
            Path(marker).touch()
        if not self.training:
            raise Stopped(signum, self.trainer.global_step, saved=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.training = True

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        signum = self.agreed(trainer)
        if not signum:
            return
        self.signum = signum
        step = trainer.global_step
        saved = not self.keeper.validates(step, step >= pl_module.total_steps)
        if saved:
            self.keeper.expect_finite(trainer)
            trainer.save_checkpoint(self.keeper.folder.last, weights_only=False)
        raise Stopped(signum, step, saved)

    def agreed(self, trainer: L.Trainer) -> int:
        """The signal that any rank has got by now (SIGTERM where both came), 0 for none; the same on every rank."""
        if not distributed.active():
            return self.signum
        counts = torch.tensor([float(self.signum == signum) for signum in SIGNALS], device=trainer.strategy.root_device)
        found = [signum for signum, count in zip(SIGNALS, distributed.total(counts).tolist(), strict=True) if count]
        return int(max(found, default=0))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = False
        self.stop_if_asked(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.listen()
        self.training = False
        self.stop_if_asked(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.training = trainer.state.fn == "fit"  # the scores and the checkpoint of this step are still to be written

    def stop_if_asked(self, trainer: L.Trainer) -> None:
        """The signal came after the ranks had agreed to go on."""
        if self.signum:
            raise Stopped(self.signum, trainer.global_step, saved=False)


def in_main_thread() -> bool:
    """Python lets the main thread alone handle signals; elsewhere a run simply does not listen."""
    return threading.current_thread() is threading.main_thread()
