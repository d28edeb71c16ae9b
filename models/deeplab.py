"""The head of DeepLabv3 and DeepLabv3+ on the levels of a backbone; its pyramid of convolutions is torchvision's.

Sources: Chen et al., DeepLabv3 (2017) and DeepLabv3+ (ECCV 2018); as Deep Spectral Methods (CVPR 2022) uses it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.segmentation.deeplabv3 import ASPP

from common.errors import ConfigError, one_of

NORMS = ("batch", "group")
GROUPS = 32
"""Groups of a group norm at most, of four channels at least: the pooled map of a picture has one place."""
LOW = 48
"""Channels that the low level is brought to."""


class DeepLabHead(nn.Module):
    """Codes and logits from a deep map, and from a finer low one where there are two levels (v3+).

    `forward` gives codes [B,hidden,h,w] at the grid of the low level (of the deep one without); `classify` logits
    [B,classes,h,w] of codes. norm: batch (as released; each device its own on CPUs) or group. dropout: share of the
    pyramid's outputs (torchvision has 0.5; drawn by the library).

    Raises:
        ConfigError: a norm or sizes that cannot be.
    """

    def __init__(
        self, channels: Sequence[int], classes: int, hidden: int, rates: Sequence[int], norm: str, dropout: float
    ) -> None:
        super().__init__()
        one_of("method.head.norm", norm, NORMS)
        if hidden < 4:
            raise ConfigError(f"method.head.hidden={hidden}: must be at least 4")
        if not rates or min(rates) < 1:
            raise ConfigError(f"method.head.rates={list(rates)}: expected dilations of at least 1, such as [12,24,36]")
        if not 0 <= dropout < 1:
            raise ConfigError(f"method.head.dropout={dropout:g}: expected a number from 0 to below 1")
        self.pyramid = ASPP(channels[-1], rates, hidden)
        self.pyramid.project[-1] = nn.Dropout(dropout)
        self.low = _block(channels[0], LOW, 1) if len(channels) > 1 else None
        self.merge = _block(hidden + (LOW if self.low is not None else 0), hidden, 3)
        self.classifier = nn.Conv2d(hidden, classes, 1)
        if norm == "group":
            _group_norms(self)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Levels [B,C,h,w] from low to deep; those between the first and the last are not looked at."""
        deep = self.pyramid(levels[-1])
        if self.low is None:
            return self.merge(deep)
        deep = F.interpolate(deep, size=levels[0].shape[-2:], mode="bilinear", align_corners=False)
        return self.merge(torch.cat([deep, self.low(levels[0])], dim=1))

    def classify(self, codes: Tensor) -> Tensor:
        return self.classifier(codes)


class MaskHead(DeepLabHead):
    """A DeepLab head for pixels of objects: `classify` gives their embeddings [B,dim,h,w] of codes, `salience` the
    logit of being one, [B,h,w]. Source: MaskContrast (Van Gansbeke et al., ICCV 2021)."""

    def __init__(
        self, channels: Sequence[int], dim: int, hidden: int, rates: Sequence[int], norm: str, dropout: float
    ) -> None:
        super().__init__(channels, dim, hidden, rates, norm, dropout)
        self.object = nn.Conv2d(hidden, 1, 1, bias=False)

    def salience(self, codes: Tensor) -> Tensor:
        return self.object(codes)[:, 0]


def _block(in_dim: int, dim: int, side: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_dim, dim, side, padding=side // 2, bias=False), nn.BatchNorm2d(dim), nn.ReLU())


def _group_norms(module: nn.Module) -> None:
    """Every batch norm below a module becomes a group norm, in place."""
    for name, part in module.named_children():
        if isinstance(part, nn.BatchNorm2d):
            width = part.num_features
            groups = next(groups for groups in range(max(1, min(GROUPS, width // 4)), 0, -1) if width % groups == 0)
            setattr(module, name, nn.GroupNorm(groups, width))
        else:
            _group_norms(part)
