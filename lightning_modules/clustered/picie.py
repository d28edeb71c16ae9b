"""PiCIE (Cho et al., CVPR 2021): pixels of two views are classified into the clusters of both; PiCIE+H by two heads.

Colours change between the views, and a crop is cut out of the picture of one and out of the features of the other: so
codes learn to be the same under other colours and to move with the picture. Code: janghyuncho/PiCIE; the second head,
of many clusters, is that of the paper.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from common.spec import Geometric, ViewSpec
from datamodules.base.transforms import replay
from lightning_modules.base import Loss
from lightning_modules.clustered.rounds import ClusterRounds
from losses import clusters
from models.backbone import Features


class PiCIE(ClusterRounds):
    """Losses of two views within and across their clusters, for every head of `method.heads`."""

    title = "PiCIE"
    clustered = ("view1", "view2")

    @property
    def head_sizes(self) -> list[int]:
        return list(self.cfg.method.heads or super().head_sizes)

    @property
    def views(self) -> dict[str, ViewSpec]:
        """Beside `view1`, `view2`: the whole picture in other colours, whose features are cropped as `view1` is."""
        whole = Geometric(size=self.view_size, sides=(1.0, 1.0), flip_p=0.0)
        return super().views | {
            "colour2": ViewSpec(photometric=self.recolouring, of_epoch=True),
            "view2": ViewSpec(geometric=whole, source="colour2", of_epoch=True),
        }

    def needed(self, name: str) -> Sequence[str]:
        return ("view1",) if name == "view2" else ()

    def aligned(self, maps: Tensor, views: dict[str, Any], name: str) -> Tensor:
        if name != "view2":
            return maps
        size = tuple(maps.shape[-2:])
        return replay(maps, views["view1.params"], size=size)

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        codes = [self.codes_of(views, name) for name in self.clustered]
        targets, sizes = self.targets(views), self.head_sizes
        found = [clusters.cross_views(codes, own) for own in targets]
        mix = clusters.head_weights(sizes)
        total = sum(weight * own.total for weight, own in zip(mix, found, strict=True))
        parts = {}
        for number, own in enumerate(found):
            suffix = "" if number == 0 else f"_{sizes[number]}"
            parts |= {f"within{suffix}": own.within, f"across{suffix}": own.across}
        if self.cfg.method.mse:
            parts["mse"] = clusters.mean_square(*codes)
            total = (total + parts["mse"]) / 2
        parts |= {f"loss{i + 1}{j + 1}": found[0].terms[i][j] for i in range(2) for j in range(2)}
        parts["used"] = self.used(targets[0])
        logged = {name: torch.as_tensor(value).detach() for name, value in parts.items()}
        return Loss(total, logged, codes=codes[0].detach(), view="view1")
