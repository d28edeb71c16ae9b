"""The three kinds of steps of an offline stage. See `pseudo_labels/__init__.py` for how they go together.

A step is identified by its class, `version`, `settings()`, the steps it needs, the pictures it sees and the backbone it
was given; change any of them and its folder is another one. A step may not depend on anything else.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from datamodules.base.transforms import Geometry
from models.backbone import Backbone
from pseudo_labels.cache import Arrays, Record, Records, Weights
from pseudo_labels.views import View

Results = Mapping[str, Records | Arrays | Weights]
"""What steps gave, by the names of the steps."""


class Step(ABC):
    """What all kinds have.

    `name`: of its folder and for the steps that need it; rounds of a loop have names of their own. `version`: raised
    when the code changes what it gives. `needs`: names of earlier steps whose results it reads; it is given no others.
    """

    name: str
    version: int = 1
    needs: tuple[str, ...] = ()

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything that the result depends on beside pictures, backbone and needed steps: plain values. A step that
        draws puts the seed in; one that does not leaves it out, and all seeds share its folder."""

    def identity(self) -> dict[str, Any]:
        """What `settings` says, and which code it is said of."""
        return {"class": type(self).__name__, "version": self.version, "settings": self.settings()}


class MapStep(Step, nn.Module):
    """Pictures in, one record a picture out; called in evaluation mode, without gradient and inference mode.

    Networks that it uses are modules of it, so they come to the device; one that is given as `backbone` is part of the
    fingerprint. A picture's record may depend on nothing but the picture: batches are cut by position alone.

    Class facts: `split` (whose pictures), `gradients` (True: `records` runs with gradients enabled, as maps from
    gradients need), `counted` (field [R,…] whose R the summary counts as regions of a picture).
    """

    split: str = "train"
    gradients: bool = False
    counted: str | None = None
    sides: tuple[float, float] = (640.0, 640.0)
    """Mean height and width, px, of pictures that keep their own size (crop `native`), for `record_bytes`; set before
    it is asked where the data know the sizes of their files."""

    def __init__(self, backbone: Backbone | None = None) -> None:
        super().__init__()
        self.backbone = backbone

    @abstractmethod
    def geometry(self) -> Geometry:
        """How pictures come to the network: crop `none` (all of one size, in batches), or `keep` or `native` (each with
        its own shape, one at a time)."""

    @abstractmethod
    def record_bytes(self) -> int:
        """An upper estimate of what one record takes on the disk: the stage refuses to start where they do not fit."""

    def pictures(self, count: int) -> list[int]:
        """The pictures of the split that are looked at, ascending; the others are records with drop `not_chosen`."""
        return list(range(count))

    def announce(self, count: int) -> str:
        """A line about the work of `count` pictures before it starts; may raise ConfigError to refuse it."""
        return ""

    def begin(self, results: Results) -> None:
        """Once on every rank, before the first batch and on the device: read tables and weights of needed steps."""

    @abstractmethod
    def records(self, batch: dict[str, Any]) -> list[Record]:
        """The records of a batch (`image` float32 [B,3,H,W] in 0..1, `valid` bool [B,H,W], `index`, `id`, `size`),
        which holds no label. See `new_record`."""


class ReduceStep(Step):
    """Once, on rank 0, over what other steps gave; the other ranks wait for its arrays."""

    @abstractmethod
    def table(self, results: Results, device: torch.device) -> dict[str, Tensor | np.ndarray]:
        """Named arrays. `device` is there for k-means and products; raises LabelfreeError where nothing can come of
        it."""


class FitStep(Step):
    """A network that is trained on the pictures and a view of earlier steps; later steps read its weights.

    Training goes through `Trainer.fit`: keyed batches, as for a method, and a checkpoint every
    `trainer.checkpoint_every` steps, from which a killed one goes on. What it draws by itself is keyed by the step.
    """

    steps: int
    batch_size: int

    @abstractmethod
    def geometry(self) -> Geometry:
        """How the training pictures are cut; random crops and flips are allowed."""

    @abstractmethod
    def module(self, results: Results) -> L.LightningModule:
        """The network with `training_step` on a batch (`image`, `valid`, `pseudo` where there is a view, `index`, `id`)
        and `configure_optimizers`; its whole state dict is kept."""

    def view(self, results: Results) -> View | None:
        """Label maps that come with the batch as `pseudo`."""
        return None


def whole_patches(batch: dict[str, Any], patch: int) -> Tensor:
    """The pictures of a batch [B,3,H,W], with rows and columns at the bottom and right cut off that fill no patch.

    Padding is cut off too where the batch is a single picture, as it is for crops `keep` and `native`.
    """
    images = batch["image"]
    if len(images) == 1 and "valid" in batch:
        valid = batch["valid"][0]
        images = images[:, :, : int(valid.any(1).sum()), : int(valid.any(0).sum())]
    height, width = (max(side // patch, 1) * patch for side in images.shape[-2:])
    return images[:, :, :height, :width]


def new_record(batch: dict[str, Any], row: int, images: Tensor, grid: tuple[int, int], **fields: Any) -> Record:
    """The record of a row of the batch, of which the network saw `images` [B,3,H,W] from the upper left.

    fields: arrays or tensors; tensors are detached and brought to the CPU.
    """
    valid = batch["valid"][row]
    shown = int(valid.any(1).sum()), int(valid.any(0).sum())
    extent = tuple(side / whole for side, whole in zip(images.shape[-2:], shown, strict=True))
    arrays = {name: v.detach().cpu().numpy() if isinstance(v, Tensor) else np.asarray(v) for name, v in fields.items()}
    size = tuple(int(side) for side in batch["size"][row])
    return Record(int(batch["index"][row]), batch["id"][row], size, tuple(grid), extent, arrays)
