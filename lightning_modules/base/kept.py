"""Frozen features of the training and validation pictures, kept in files (`backbone.cache_features`)."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from common.errors import ConfigError
from common.files import cache_folder
from common.precision import usable
from datamodules.base.transforms import FIXED_CROPS, Geometry
from lightning_modules.base.asked import Asked
from models import feature_store
from models.backbone import Features
from models.feature_store import FeatureStore, Layout


def check_kept(method: Asked) -> None:
    """Raises ConfigError where features cannot be kept: they change, or the method has no use for them."""
    cfg = method.cfg
    off = "set backbone.cache_features=false"
    if not method.backbone.frozen:
        raise ConfigError(f"backbone.cache_features=true: method={cfg.method.name} trains the backbone; {off}")
    if not method.trains:
        raise ConfigError(
            f"backbone.cache_features=true: method={cfg.method.name} does not train, so it sees every picture once; "
            f"{off}"
        )
    if cfg.data.train_crop not in FIXED_CROPS:
        raise ConfigError(
            f"backbone.cache_features=true: data.train_crop={cfg.data.train_crop} cuts pictures by chance or leaves "
            f"their sizes; set data.train_crop=center, five or none, or {off[4:]}"
        )
    if cfg.data.flip_p > 0:
        raise ConfigError(
            f"backbone.cache_features=true: data.flip_p={cfg.data.flip_p:g} mirrors pictures by chance; "
            f"set data.flip_p=0, or {off[4:]}"
        )


@torch.no_grad()
def keep_features(method: Asked, data: Any) -> dict[str, FeatureStore]:
    """Split -> its features, read from `cache.dir` or computed now; a collective. `data`: the DataModule.

    The validation pictures are left out where they keep their own sizes (`data.eval_crop=keep`).

    Raises:
        ConfigError: the method looks at the backbone's attention, which is not kept, or the disk is too small.
        DataError: the disk fills up, or a feature is too large for half precision.
    """
    if method.wants_attention:
        raise ConfigError(
            f"backbone.cache_features=true: method={method.cfg.method.name} looks at the attention of the backbone, "
            "which is not kept; set method.lhp.attention=affinity, or backbone.cache_features=false"
        )
    geometries = {"train": data.train_geometry, "val": data.eval_geometry}
    return {split: _keep(method, data, split, g) for split, g in geometries.items() if g.crop in FIXED_CROPS}


def _keep(method: Asked, data: Any, split: str, geometry: Geometry) -> FeatureStore:
    multiple = data.pad_multiple
    height, width = (-(-side // multiple) * multiple for side in geometry.kept_size(1, 1))
    layout = Layout.of(_features(method, torch.zeros(1, method.backbone.in_channels, height, width)))
    items = len(data.source(split)) * geometry.crops
    precision = usable(method.cfg.trainer.precision, method.device.type)
    name = feature_store.name(method.features_key, data.fingerprint(split, geometry), f"{height}x{width}", precision)

    def batches() -> Iterator[tuple[Tensor, Features]]:
        for batch in method.unlabelled_loader(split, geometry=geometry, purpose="features"):
            yield batch["index"], _features(method, batch["image"])

    path = cache_folder(method.cfg) / "features" / name
    what = f"{items} pictures of '{split}'"
    return feature_store.provide(path, items, layout, batches(), what, method.device)


def _features(method: Asked, images: Tensor) -> Features:
    with method.trainer.precision_plugin.forward_context():
        return method.features(images.to(method.device))
