"""What libraries draw by themselves while a network is trained, keyed like every draw of ours."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from common.chance import key


class LibraryDraws(Callback):
    """Keys torch's global streams, CPU and CUDA, by (seed, purpose, step, rank) before each training step.

    Dropout and stochastic depth inside a library's layers draw from them. To restore the streams of a checkpoint would
    not do: every new iterator of a DataLoader draws from the CPU's as well, and a run that goes on makes others.
    """

    def __init__(self, seed: int, purpose: str = "library") -> None:
        self.seed, self.purpose = int(seed), purpose

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        torch.manual_seed(key(self.seed, self.purpose, trainer.global_step, trainer.global_rank))

    on_train_start = on_train_epoch_start = on_train_batch_start
