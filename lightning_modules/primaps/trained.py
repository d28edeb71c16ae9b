"""A trained method whose codes stand in place of the features (`method.init_from`)."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

import config
from common.errors import CheckpointError
from common.spec import ClassMeta
from lightning_modules import registry
from lightning_modules.base import UnsupervisedSegmenter
from models.backbone import Backbone

OF_EVALUATION = ("cluster_probe", "kmeans_probe", "linear_probe", "confusion", "further", "usage")
"""Parts of a method that its codes do not need."""
OF_FEATURES = ("levels", "level_norm", "pos_interp", "mean", "std")
"""Keys of the backbone that change features and are no part of its fingerprint."""


def frozen_method(cfg: DictConfig, meta: ClassMeta, backbone: Backbone) -> UnsupervisedSegmenter:
    """The method of the settings `method.base`, in evaluation mode and without gradients, on a backbone that is there
    already: a plain attribute, so that it is registered, moved and saved once. It has first weights only."""
    tree = config.plain(cfg) | {"method": config.plain(cfg.method.base)}
    base = registry.method_class(cfg.method.base.name)(OmegaConf.create(tree), meta, linear_probe=False)
    for name in ("backbone", *OF_EVALUATION):
        base._modules.pop(name, None)
    base.__dict__["backbone"] = backbone
    return base.eval().requires_grad_(False)


def expect_same_features(checkpoint: dict[str, Any], cfg: DictConfig, backbone: Backbone) -> None:
    """Raises CheckpointError where a checkpoint's method was trained on other features than this backbone gives."""
    facts, key = checkpoint["labelfree"], f"method.init_from={cfg.method.init_from}"
    stored, own = facts["config"]["backbone"], config.plain(cfg.backbone)
    if not stored["frozen"]:
        raise CheckpointError(
            f"{key}: {facts['config']['method']['name']} trained its backbone; begin with that itself: "
            "backbone.weights=<the file that its run has exported>, without method.init_from"
        )
    if facts["backbone"] != backbone.fingerprint:
        raise CheckpointError(
            f"{key}: was trained on the backbone {facts['backbone']}, and this run has {backbone.fingerprint}; give "
            "the words backbone=… and backbone.weights=… that it was trained with"
        )
    parts = ({"backbone": {name: tree.get(name) for name in OF_FEATURES}} for tree in (stored, own))
    difference = config.first_difference(*parts)
    if difference is not None:
        raise CheckpointError(f"{key}: was trained on other features, first difference {difference}; give the same")
