"""The loop of a detector trained inside an offline stage: optimiser, rates, clipping, and where its backbone is.

A subclass says what a step learns from.
"""

import copy
from typing import Any

import lightning as L
from omegaconf import DictConfig
from torch import Tensor

import config
from common.spec import IGNORE
from lightning_modules.base.optim import CompositeOptimizer, clip_gradients, scheduled
from models.backbone import Backbone, Features
from models.detection.detector import Detector

MOST = IGNORE - 1
"""Objects of a picture that a map can hold."""


def take_weights(state: dict[str, Tensor], detector: Detector, backbone: Backbone) -> None:
    """Put the weights of a loop that has ended into a detector, and into a backbone where it was trained."""
    for prefix, part in (("detector.", detector), ("backbone.", backbone)):
        found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if found:
            part.load_state_dict(found)


class DetectorLoop(L.LightningModule):
    """A detector by `optim.detector`, and a backbone by `optim.backbone` where it is trained; one that is not is no
    part of what is kept."""

    def __init__(
        self, cfg: DictConfig, detector: Detector, backbone: Backbone, steps: int, *, rate: float = 1.0, trained: bool
    ) -> None:
        """steps: that the schedules go by; rate: what the learning rates are multiplied by; trained: the backbone is,
        as a copy."""
        super().__init__()
        self.cfg, self.detector, self.steps, self.rate = cfg, detector, steps, rate
        if trained:
            self.backbone, self.held = copy.deepcopy(backbone), ()
        else:
            self.held = (backbone,)  # in a tuple, or it would be a module of this one

    def on_fit_start(self) -> None:
        for part in self.held:
            part.to(self.device)

    def features(self, images: Tensor) -> Features:
        return self.held[0].features(images) if self.held else self.backbone.features(images, grad=True)

    def configure_optimizers(self) -> CompositeOptimizer:
        groups = {"detector": list(self.detector.parameters())}
        if not self.held:
            groups["backbone"] = [value for value in self.backbone.parameters() if value.requires_grad]
        settings = config.plain(self.cfg.optim)
        return CompositeOptimizer([self._group(name, params, settings[name]) for name, params in groups.items()])

    def _group(self, name: str, params: list[Tensor], settings: dict[str, Any]) -> dict[str, Any]:
        return {**settings, "name": name, "params": params, "owner": "method", "lr": self.rate * settings["lr"]}

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        for group in self.optimizers().optimizer.param_groups:
            group |= scheduled(group, self.global_step, self.steps)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for group in optimizer.param_groups:
            clip_gradients(group)
