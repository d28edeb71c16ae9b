"""The built-in data set: drawn scenes with exact labels, made on the fly. No file, no download, any size.

Picture i of a split is a function of (data.scenes_seed, split, i) and its size, the same to the bit in any process.
The drawing and its difficulty are frozen (tests/datamodules/scenes/test_scenes.py), so that numbers stay comparable.

Difficulty, mIoU in percent on the 200 val scenes at 128 px, measured before any method was tuned:
k-means on the mean colour of 8x8 patches 9.9; a supervised U-Net of 0.28 million parameters, trained for two minutes on
the 2000 train scenes, 87.0; spherical k-means on that net's last features 73.5; a perfect read-out at 8x8 patches 85.7.
Shares of pixels run from 26 % (sky) to 1.1 % (person, in one scene of sixteen).
"""

import numpy as np

from common.errors import ConfigError
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.base.instances import Instances
from datamodules.scenes.drawing import META, draw_scene, draw_things

SMALLEST = 32
"""Pixels of the shorter side below which the scenes are not recognisable."""


VISIBLE = 16
"""Pixels below which what is left of a thing behind others, or at the rim, is no object."""


class SceneSource:
    """`count` scenes of one split, drawn at height x width pixels."""

    def __init__(self, seed: int, split: str, count: int, height: int, width: int) -> None:
        self.seed, self.split, self.count = seed, split, count
        self.height, self.width = height, width

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"{self.split}/{index:06d}"

    def fingerprint(self) -> str:
        """The drawing is frozen, so its parameters tell the pictures."""
        return f"scenes/{self.seed}/{self.split}/{self.count}/{self.height}x{self.width}"

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 [H,W,3] and label uint8 [H,W] (every pixel has a class)."""
        return draw_scene(self.seed, self.split, index, self.height, self.width)

    def instances(self, index: int) -> Instances:
        """The visible part of every thing, where it is at least 16 px."""
        return Instances.of_map(draw_things(self.seed, self.split, index, self.height, self.width), VISIBLE)

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of every scene."""
        return self.height, self.width


class ScenesDataModule(SegmentationDataModule):
    """`data=scenes`: drawn directly at data.train_size and data.eval_size (a number: square pictures).

    Raises ConfigError for counts below 1, sizes below 32 px, and folders, which it has no use for.
    """

    def build_source(self, split: str) -> SceneSource:
        self._check()
        size = self.data.train_size if split == "train" else self.data.eval_size
        height, width = (size, size) if isinstance(size, int) else size
        count = self.data.train_count if split == "train" else self.data.val_count
        return SceneSource(int(self.data.scenes_seed), split, int(count), int(height), int(width))

    def build_meta(self) -> ClassMeta:
        return META

    def _check(self) -> None:
        for key in ("root", "train_roots"):
            if self.data[key]:
                raise ConfigError(
                    f"data.{key}={self.data[key]}: data=scenes draws its pictures and reads no folder; "
                    "leave the key out, or choose data=folder"
                )
        for key in ("train_count", "val_count"):
            if self.data[key] < 1:
                raise ConfigError(f"data.{key}={self.data[key]}: must be 1 or more pictures")
        for key in ("train_size", "eval_size"):
            size = self.data[key]
            if min([size] if isinstance(size, int) else size) < SMALLEST:
                raise ConfigError(f"data.{key}={size}: scenes cannot be drawn below {SMALLEST} px; set a larger size")
