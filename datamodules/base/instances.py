"""Objects of a picture one by one, as people drew them or a generator knows them. Read by evaluation alone."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.base.transforms import Geometry


@dataclass(frozen=True)
class Padded:
    """The objects of a picture in a batch."""

    masks: Tensor
    """bool [n,H,W]."""
    crowd: Tensor
    """bool [n]."""


@dataclass(frozen=True)
class Instances:
    """n objects of a picture; they may overlap."""

    masks: np.ndarray
    """bool [n,H,W]."""
    crowd: np.ndarray
    """bool [n]: a group that was not taken apart; what is found in it counts neither for nor against."""

    @classmethod
    def of_map(cls, ids: np.ndarray, smallest: int = 1) -> "Instances":
        """From a map int [H,W] in which 0 is nothing and every other value one object; those below `smallest` px are
        left out."""
        values, counts = np.unique(ids, return_counts=True)
        kept = values[(values != 0) & (counts >= smallest)]
        return cls(ids[None] == kept[:, None, None], np.zeros(len(kept), bool))

    def fitted(self, geometry: Geometry, crop: int, draw: np.random.Generator, flip: bool = False) -> "Instances":
        """As `geometry` shows their picture, by equal draws; objects of which nothing is left are gone."""
        if not len(self.masks):
            size = geometry.kept_size(*self.masks.shape[1:])
            return Instances(np.zeros((0, *size), bool), self.crowd)
        maps = np.dstack([geometry.resize_map(mask, crop).astype(np.uint8) for mask in self.masks])
        masks = geometry.finish(maps, None, draw, flip)[0].transpose(2, 0, 1).astype(bool)
        seen = masks.any((1, 2))
        return Instances(masks[seen], self.crowd[seen])

    def padded(self, size: tuple[int, int]) -> Padded:
        """At the size of a batch, with nothing on the padding."""
        whole = torch.zeros(len(self.masks), *size, dtype=torch.bool)
        whole[:, : self.masks.shape[1], : self.masks.shape[2]] = torch.from_numpy(np.ascontiguousarray(self.masks))
        return Padded(whole, torch.from_numpy(self.crowd.copy()))
