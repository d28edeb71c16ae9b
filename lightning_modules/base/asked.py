"""What kept features, near pictures and contour regions ask of the method that they are for."""

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from omegaconf import DictConfig

from models.backbone import Backbone
from models.features import Features


class Asked(Protocol):
    """The part of `segmenter.UnsupervisedSegmenter` that its helpers see; its docstrings say what each is."""

    cfg: DictConfig
    backbone: Backbone
    device: torch.device
    trainer: Any
    trains: bool
    region_key: str
    neighbour_table: str | None
    wants_attention: bool
    features_key: str

    def unlabelled_loader(self, split: str, **settings: Any) -> Iterable[dict[str, Any]]: ...

    def features(self, images: torch.Tensor) -> Features: ...

    def frozen_features(self, split: str, batch: dict[str, Any]) -> Features: ...
