"""k-means on frozen features (or colours, or SIFT): the row that every method has to beat. Its score is val/kmeans/*.

Nothing is trained but the two online probes. `method.features: keys` clusters what EAGLE is trained on; `colour` mean
patch colours, the floor that any feature has to beat; `sift` descriptors of gradients, what was there before networks.
"""

from functools import cache

import torch
from kornia.feature import SIFTDescriptor
from torch import Tensor
from torch.nn import functional as F

from datamodules.base.views import GRAY
from lightning_modules.families.keys import KeyFeatures
from models.backbone import Features

PATCHES = 1 << 14
"""Patches whose descriptors are computed at once: their gradient histograms take 75 MB."""


class KMeansBaseline(KeyFeatures):
    """Codes = L2-normalised backbone features (all of `backbone.levels`), attention keys, patch colours, or SIFT."""

    title = "k-means"
    headline = "kmeans"
    trains = False

    def build(self) -> None:
        settings = self.cfg.method
        self.kind = settings.features
        self.build_keys(settings.blocks if self.kind == "keys" else 0)
        self.code_dim = {"colour": 3, "sift": 128}.get(self.kind, self.feature_dim)

    def features(self, images: Tensor) -> Features:
        finest = min(self.backbone.strides)
        if self.kind == "colour":
            maps = F.avg_pool2d(images, finest) - 0.5
        elif self.kind == "sift":
            settings = self.cfg.method.sift
            maps = dense_sift(images, settings.step or finest, settings.side)
        else:
            return super().features(images)
        return Features(levels=[maps], cls=None, attention=None, qkv=None, prefix=0)

    def embed(self, features: Features) -> Tensor:
        return F.normalize(features.concat(), dim=1)


@torch.no_grad()
def dense_sift(images: Tensor, step: int, side: int) -> Tensor:
    """Descriptors [B,128,h,w] of pictures [B,C,H,W], whose first three channels are red, green and blue, on a regular
    grid: one for every cell of `step` px, of the upright square of `side` px around the cell's centre. Float32.

    Squares that reach beyond the picture repeat its border. A square without any edge has a descriptor of zeros.
    Sources: SIFT (Lowe, IJCV 2004); a grid, of squares of 12 px every 10 px, as in the baseline of IIC (ICCV 2019).
    """
    grey = torch.einsum("c,bchw->bhw", images.new_tensor(GRAY), images[:, :3]).float()
    squares = grey[:, covered(grey.shape[1], step, side).to(grey.device)]
    squares = squares[..., covered(grey.shape[2], step, side).to(grey.device)]  # [B,h,side,w,side]
    squares = squares.transpose(2, 3)
    with torch.autocast(grey.device.type, enabled=False):
        parts = squares.reshape(-1, 1, side, side).split(PATCHES)
        found = torch.cat([descriptor(side)(part) for part in parts])
    return found.unflatten(0, squares.shape[:3]).permute(0, 3, 1, 2)


def covered(length: int, step: int, side: int) -> Tensor:
    """The pixels of an axis that the square around each cell's centre covers, int64 [cells,side]."""
    first = torch.arange(-(-length // step)) * step + (step - side) // 2
    return (first[:, None] + torch.arange(side)).clamp(0, length - 1)


@cache
def descriptor(side: int) -> SIFTDescriptor:
    """kornia's, 8 directions in 4 x 4 bins; its kernels are constants, so it is no part of a method's state."""
    return SIFTDescriptor(side, rootsift=False).requires_grad_(False)
