"""Methods whose features are attention keys of the last blocks, side by side, in place of the blocks' outputs."""

import logging

from torch import Tensor

from common.errors import ConfigError
from lightning_modules.base import UnsupervisedSegmenter
from models.backbone import Features

log = logging.getLogger(__name__)


class KeyFeatures(UnsupervisedSegmenter):
    """A part of a method: `Features.levels` are the keys of `blocks` as projected; without blocks the backbone's."""

    blocks: tuple[int, ...] = ()
    """Negative from the end, the last one last."""

    def build_keys(self, count: int) -> None:
        """For `build`: take the keys of so many blocks. A network without keys gives its levels, and a line says so.

        Raises:
            ConfigError: more blocks than there are.
        """
        if not count:
            return
        if not self.backbone.has_attention:
            log.info("%s has no attention keys: the features are its levels (backbone.levels)", self.backbone.name)
            return
        depth = len(self.backbone.net.blocks)
        if count > depth:
            raise ConfigError(
                f"method.blocks={count}: {self.backbone.network} has {depth} blocks; choose at most so many"
            )
        self.blocks = tuple(range(-count, 0))

    @property
    def feature_dim(self) -> int:
        """C of the features, all levels side by side."""
        return self.backbone.channels[-1] * len(self.blocks) if self.blocks else self.backbone.dim

    @property
    def features_key(self) -> str:
        return super().features_key + (f" keys of {self.blocks}" if self.blocks else "")

    def features(self, images: Tensor) -> Features:
        if not self.blocks:
            return super().features(images)
        found = self.backbone.features(images, keys=self.blocks)
        return Features(found.keys, cls=found.cls, prefix=found.prefix)
