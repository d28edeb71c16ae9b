"""k-means on frozen features (or colours, or SIFT): the row that every method has to beat. Its score is val/kmeans/*.

Nothing is trained but the two online probes. `method.features: keys` clusters what EAGLE is trained on; `colour` mean
patch colours, the floor that any feature has to beat; `sift` descriptors of gradients, what was there before networks.
`method.whitening` clusters principal components of equal variance, as DeepCluster does with pictures.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from kornia.feature import SIFTDescriptor
from torch import Tensor
from torch.nn import functional as F

from common import chance, distributed
from common.errors import ConfigError
from datamodules.base.views import GRAY
from evaluation.readout import valid_patches
from lightning_modules.families.keys import KeyFeatures
from models.backbone import Features
from retrieval.whitening import principal, whitened

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
        if self.kind in ("colour", "sift") and self.cfg.backbone.debias != "none":
            raise ConfigError(
                f"backbone.debias={self.cfg.backbone.debias}: nothing is taken out of method.features={self.kind}, "
                "which the backbone does not make; set backbone.debias=none"
            )
        width = {"colour": self.backbone.in_channels, "sift": 128}.get(self.kind, self.feature_dim)
        self.code_dim = settings.whitening or width
        if self.code_dim > width:
            raise ConfigError(
                f"method.whitening={self.code_dim}: the features have {width} channels; set {width} at most, or null"
            )
        if settings.whitening:
            self.register_buffer("mean", torch.zeros(width))
            self.register_buffer("axes", torch.zeros(settings.whitening, width))

    @torch.no_grad()
    def prepare(self, loader: Callable[..., Any]) -> None:
        """The principal axes of features of training pictures, where they are whitened."""
        if not self.cfg.method.whitening:
            return
        rules, rows = self.cfg.evaluation.kmeans, []
        batches = loader("train", order="shuffled", limit=rules.pictures, purpose="whitening")
        share = max(1, rules.points // min(rules.pictures, len(batches.dataset)))
        for batch in batches:
            maps = self.features(batch["image"].to(self.device)).concat()
            inside = valid_patches(batch["valid"].to(self.device), maps.shape[-2:]).flatten(1)
            for index, picture, valid in zip(batch["index"].tolist(), maps.flatten(2).mT, inside, strict=True):
                own = picture[valid]
                order = torch.randperm(len(own), generator=chance.generator(self.cfg.seed, "whitening.points", index))
                rows.append(own[order[:share].to(own.device)])
        points = torch.cat(rows) if rows else self.mean.new_empty(0, len(self.mean))
        mean, axes = principal(distributed.gather_uneven(points), len(self.axes))
        self.mean.copy_(mean)
        self.axes.copy_(axes)

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
        maps = features.concat()
        if not self.cfg.method.whitening:
            return F.normalize(maps, dim=1)
        return whitened(maps.movedim(1, -1), self.mean, self.axes).movedim(-1, 1)


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
