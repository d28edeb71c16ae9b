"""IIC's network for segmentation ("SegmentationNet10a", Ji et al., ICCV 2019): VGG-like, of any number of channels.

It speaks the language of timm's feature networks (`feature_info`, `out_indices`), so that a backbone can be made of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.precision import real
from models.scratch.levels import Levels

WIDTHS = (64, 128, 256, 256, 512, 512)
DILATIONS = (1, 1, 1, 1, 2, 2)
POOLED = 2
"""Layers in front of the only pooling."""
PADDINGS = (1, "same")
RED_GREEN_BLUE = (0.299, 0.587, 0.114)
"""Weights of the three colours in grey, those of OpenCV and Pillow."""


class Net10a(nn.Module):
    """Six 3x3 convolutions without bias, each with batch norm and ReLU; pooled by 2 behind the second, the last two
    with dilation 2. Each of them is a level: strides 1, 1, 2, 2, 2, 2.

    Weights are drawn by Kaiming's rule (normal, fan-in). Names are those of the release (`features.<i>`: convolution,
    batch norm and ReLU count three, pooling one).

    Args:
        in_chans: channels of the pictures: 3, or 4 with infrared as the last.
        widths: channels of the six layers.
        padding: 1: also where the dilation is 2, as released, so that the map of the last two levels is 2 and 4 cells
            smaller than H/2 (128 px: 60 cells); "same": by the dilation, so that no map shrinks.
        sobel: whether the gradient of the grey picture is looked at as well, see `with_edges`.
        out_indices: levels that are given, ascending; None: the last. Layers behind the last of them are not built.
    """

    def __init__(
        self,
        in_chans: int = 3,
        widths: Sequence[int] = WIDTHS,
        padding: int | str = 1,
        sobel: bool = False,
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check(in_chans, widths, padding, sobel)
        self.sobel = sobel
        self.out_indices = tuple(out_indices) if out_indices is not None else (len(widths) - 1,)
        strides = [1 if number < POOLED else 2 for number in range(len(widths))]
        self.feature_info = Levels(widths, strides, self.out_indices)
        self.pretrained_cfg = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans}
        layers: list[nn.Module] = []
        channels, self.ends = in_chans + (2 if sobel else 0), {}
        for number in range(max(self.out_indices) + 1):
            width, dilation = widths[number], DILATIONS[number]
            if number == POOLED:
                layers.append(nn.MaxPool2d(2))
            around = dilation if padding == "same" else 1
            layers.append(nn.Conv2d(channels, width, 3, padding=around, dilation=dilation, bias=False))
            layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            self.ends[len(layers) - 1] = number
            channels = width
        self.features = nn.Sequential(*layers)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures [B,C,H,W] in 0..1 -> the maps [B,C,h,w] of `out_indices`."""
        values = with_edges(pictures) if self.sobel else pictures
        found = []
        for place, layer in enumerate(self.features):
            values = layer(values)
            if self.ends.get(place) in self.out_indices:
                found.append(values)
        return found

    def reset_classifier(self, num_classes: int) -> None:
        """What timm calls to take off a classifier; there is none."""


class InformationHead(nn.Module):
    """Sub-heads that give class probabilities of pixels: 1x1 convolutions without bias, as IIC puts them on `Net10a`.

    Args:
        channels: C of the maps.
        classes: K.
        sub_heads: S, how many there are; each is drawn and trained by itself.
        padding: whether a ring of cells with even probabilities is put around a map, as released (a convolution of one
            cell with padding 1): it brings `Net10a`'s map from 4 cells short of half the picture to 2.
    """

    def __init__(self, channels: int, classes: int, sub_heads: int = 1, padding: bool = True) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, classes, 1, padding=int(padding), bias=False) for _ in range(sub_heads)
        )
        for head in self.heads:
            nn.init.kaiming_normal_(head.weight, mode="fan_in", nonlinearity="relu")

    def forward(self, maps: Tensor, size: Sequence[int] | None = None) -> list[Tensor]:
        """Maps [B,C,h,w] -> probabilities of each sub-head, float32 [B,K,H,W], brought to `size` bilinearly (None: as
        the map, with its ring)."""
        found = [F.softmax(real(head(maps)), dim=1) for head in self.heads]
        if size is None:
            return found
        return [F.interpolate(values, tuple(size), mode="bilinear", align_corners=False) for values in found]


def net10a(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    features_only: bool = True,
    **settings: Any,
) -> Net10a:
    """`Net10a` as timm makes its networks; there are no published weights, so all but `settings` is of no account."""
    return Net10a(**settings)


def check(in_chans: Any, widths: Any, padding: Any, sobel: Any) -> None:
    """Raises ValueError for a setting that Net10a cannot have."""
    wrong = None
    if not isinstance(in_chans, int) or isinstance(in_chans, bool) or in_chans < 1:
        wrong = f"in_chans={in_chans}: expected a whole number of 1 or more, the channels of the pictures"
    elif sobel not in (True, False) or (sobel and in_chans not in (3, 4)):
        wrong = f"sobel={sobel}: expected true or false, and true needs pictures of 3 or 4 channels (in_chans)"
    elif padding not in PADDINGS or padding is True:
        wrong = f"padding={padding}: expected 1 (as released) or same"
    elif len(widths) != len(WIDTHS) or not all(isinstance(width, int) and width > 0 for width in widths):
        wrong = f"widths={list(widths)}: expected {len(WIDTHS)} whole numbers of 1 or more"
    if wrong is not None:
        raise ValueError(wrong)


def with_edges(pictures: Tensor) -> Tensor:
    """Colours and the gradient of their grey: [B,3,H,W] -> [B,5,H,W], red, green, blue, dx, dy; with infrared as a
    fourth channel -> [B,6,H,W], where it stays the last."""
    colours, infrared = pictures[:, :3], pictures[:, 3:]
    return torch.cat([colours, sobel(grey(colours)), infrared], dim=1)


def grey(colours: Tensor) -> Tensor:
    """[B,3,H,W], red first -> [B,1,H,W]."""
    weights = colours.new_tensor(RED_GREEN_BLUE).view(3, 1, 1)
    return (colours * weights).sum(1, keepdim=True)


def sobel(values: Tensor) -> Tensor:
    """[B,1,H,W] -> its derivatives [B,2,H,W] along x (positive where values fall to the right) and y (positive where
    they fall downwards), beyond the border taken for 0."""
    across = [[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]
    down = [[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]
    return F.conv2d(values, values.new_tensor([across, down])[:, None], padding=1)
