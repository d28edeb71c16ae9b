"""A network that reads a picture in one of eight raster orders: masked convolutions, residual blocks and attention.

After the reproduction of Ouali et al., *Autoregressive Unsupervised Image Segmentation* (ECCV 2020); no code of the
authors is known. Through any number of layers behind the stem, the output at a pixel depends on pixels of its past in
the order alone; in order 0 on all. The stem sees whole neighbourhoods in every order, and so a few pixels ahead.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.precision import real
from models.scratch import orders
from models.scratch.levels import Levels

ATTENTION = {
    "masked": {},
    "multiplied": {"multiplied": True},
    "reproduction": {"multiplied": True, "faulty": True},
}
"""Rules of attention by name: the sane one, what the reproduction means to do, and what it does."""


class MaskedConv2d(nn.Conv2d):
    """A convolution of odd side F whose pixels see themselves and their past in an order. Stride 1, size kept.

    The kernel lies on F lines, the pixel's own last, and the taps ahead on that line are masked: no blind spot. Mask
    and padding go with the order, the weight never turns: a tap stands for another place in every order.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 3):
        super().__init__(in_channels, out_channels, kernel_size)
        masks = torch.stack([orders.kernel_mask(order, kernel_size) for order in range(len(orders.ORDERS) + 1)])
        self.register_buffer("masks", masks, persistent=False)

    def forward(self, maps: Tensor, order: int = 0) -> Tensor:
        """Maps [B,C,H,W] read in `order` (0 to 8) -> [B,C',H,W]."""
        side = self.kernel_size[0]
        if order == 0:
            return F.conv2d(maps, self.weight, self.bias, padding=side // 2)
        return F.conv2d(F.pad(maps, orders.padding(order, side)), self.weight * self.masks[order], self.bias)


class ResidualBlock(nn.Module):
    """C -> 2C channels: a masked 3x3 and a 1x1 convolution beside the input with C channels of zeros behind it, then
    twice two 1x1 convolutions beside the identity. A ReLU follows every convolution, none the sums; no norms."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = MaskedConv2d(channels, 2 * channels)
        for number in range(2, 7):
            setattr(self, f"conv{number}", nn.Conv2d(2 * channels, 2 * channels, 1))

    def forward(self, maps: Tensor, order: int = 0) -> Tensor:
        """Maps [B,C,H,W] -> [B,2C,H,W]."""
        inner = F.relu(self.conv2(F.relu(self.conv1(maps, order))))
        maps = inner + F.pad(maps, (0, 0, 0, 0, 0, maps.shape[1]))
        maps = F.relu(self.conv4(F.relu(self.conv3(maps)))) + maps
        return F.relu(self.conv6(F.relu(self.conv5(maps)))) + maps


class OrderedAttention(nn.Module):
    """Single-head attention of every pixel to itself and its past in an order; its output in front of the input goes
    through a 1x1 convolution.

    By default pixels ahead are masked before the softmax, whose logits are scaled. `multiplied`: logits are not scaled,
    and the 0/1 mask multiplies the softmax, so weights do not add up to one, and what they were divided by has seen the
    pixels ahead. `faulty` adds the faults of the
    reproduction: the attended values [HW,D] are read as if they were [D,HW], and masks are those of `misplaced_mask`.
    """

    def __init__(self, channels: int, dim: int, multiplied: bool = False, faulty: bool = False):
        super().__init__()
        self.query, self.key, self.value = (nn.Conv2d(channels, dim, 1) for _ in range(3))
        self.project = nn.Conv2d(dim, channels, 1)
        self.merge = nn.Conv2d(2 * channels, channels, 1)
        self.multiplied, self.faulty = multiplied, faulty

    def forward(self, maps: Tensor, order: int = 0) -> Tensor:
        """Maps [B,C,H,W] -> [B,C,H,W]. Memory of the default rule grows with H W, of the others with its square."""
        height, width = maps.shape[-2:]
        parts = [part(maps).flatten(2).transpose(1, 2) for part in (self.query, self.key, self.value)]
        attended = self._multiplied(*parts, order, height, width) if self.multiplied else causal(*parts, order, width)
        if not self.faulty:
            attended = attended.transpose(1, 2)
        attended = self.project(attended.reshape(len(maps), -1, height, width))
        return self.merge(torch.cat([attended, maps], dim=1))

    def _multiplied(self, query: Tensor, key: Tensor, value: Tensor, order: int, height: int, width: int) -> Tensor:
        weights = (query @ key.transpose(1, 2)).softmax(dim=2)
        if order != 0:
            found = misplaced_mask if self.faulty else past_mask
            weights = weights * found(order, height, width, weights.device)
        return weights @ value


def causal(query: Tensor, key: Tensor, value: Tensor, order: int, width: int) -> Tensor:
    """Scaled attention [B,HW,D] of each pixel to those up to it in the order; all pixels in order 0.

    Pixels are put in their order, where the past of each is what stands in front of it, and put back."""
    if order == 0:
        return F.scaled_dot_product_attention(query, key, value)
    place = orders.ranks(order, query.shape[1] // width, width, query.device)
    first = place.argsort()
    found = F.scaled_dot_product_attention(query[:, first], key[:, first], value[:, first], is_causal=True)
    return found[:, place]


def past_mask(order: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Which pixels (keys) each pixel (query) may see, bool [HW,HW], pixels row by row: those up to it in the order."""
    place = orders.ranks(order, height, width, device)
    return place[None] <= place[:, None]


def misplaced_mask(order: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """`past_mask` with the faults of the reproduction: row j is that of the j-th pixel of the order, not of pixel j,
    and orders 4 and 5 are exchanged against the convolution."""
    order = {4: 5, 5: 4}.get(order, order)
    place = orders.ranks(order, height, width, device)
    return past_mask(order, height, width, device)[place.argsort()]


class Decoder(nn.Conv2d):
    """Class probabilities of a map at the size of the picture: 1x1 convolution, logits enlarged, softmax."""

    def __init__(self, channels: int, classes: int):
        super().__init__(channels, classes, 1)

    def probabilities(self, maps: Tensor, size: Sequence[int]) -> Tensor:
        """Maps [B,C,h,w] -> [B,K,H,W] that add up to one over K; logits are enlarged bilinearly, in float32."""
        logits = F.interpolate(real(self(maps)), size=tuple(size), mode="bilinear", align_corners=False)
        return logits.softmax(dim=1)


class OrderedNetwork(nn.Module):
    """Stem, then L residual blocks of twice the channels each, all read in one order: a level for each block.

    The stem is a 3x3 convolution, batch norm, ReLU and max pooling of 3 pixels at stride 2, without masks. Weights are
    drawn from Xavier's normal distribution.

    Args:
        in_chans: channels of the pictures.
        width: channels of the stem; block l gives width * 2^l.
        blocks: L.
        stem_stride: 1 or 2; the output stride is twice that.
        attention_after: the block behind which attention stands, from 1; 0: none.
        attention: one of ATTENTION.
        out_indices: levels to return, ascending from 0; None: the last. Blocks behind them are not made.

    Raises:
        ValueError: a setting that it cannot have.
    """

    def __init__(
        self,
        in_chans: int = 3,
        width: int = 64,
        blocks: int = 4,
        stem_stride: int = 2,
        attention_after: int = 0,
        attention: str = "masked",
        out_indices: Sequence[int] | None = None,
    ):
        super().__init__()
        check(in_chans, width, blocks, stem_stride, attention_after, attention)
        self.levels = tuple(out_indices) if out_indices is not None else (blocks - 1,)
        self.orders: tuple[int, ...] = (0,)
        widths = [width * 2**number for number in range(1, blocks + 1)]
        self.feature_info = Levels(widths, [2 * stem_stride] * blocks, self.levels)
        self.pretrained_cfg = {"mean": (0.0,) * in_chans, "std": (1.0,) * in_chans}
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, width, 3, stem_stride, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.blocks = nn.ModuleList(ResidualBlock(count // 2) for count in widths[: max(self.levels) + 1])
        self.attention_after = attention_after
        if 0 < attention_after <= len(self.blocks):
            count = widths[attention_after - 1]
            self.attention = OrderedAttention(count, count // 2, **ATTENTION[attention])
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.xavier_normal_(part.weight)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Pictures [B,C,H,W] -> the levels, each [n B, C', H/stride, W/stride] (rounded up) for n orders."""
        stem = self.stem(pictures)
        read = [self._read(stem, order) for order in self.orders]
        return [torch.cat(level) if len(level) > 1 else level[0] for level in zip(*read, strict=True)]

    def _read(self, maps: Tensor, order: int) -> list[Tensor]:
        found = []
        for number, block in enumerate(self.blocks):
            maps = block(maps, order)
            if number + 1 == self.attention_after:
                maps = self.attention(maps, order)
            if number in self.levels:
                found.append(maps)
        return found

    def reset_classifier(self, num_classes: int) -> None:
        """What timm calls to take off a classifier; there is none."""


def ordered(
    pretrained: bool = False,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    features_only: bool = True,
    **settings: Any,
) -> OrderedNetwork:
    """`OrderedNetwork` as timm makes its networks; there are no published weights, so only `settings` matter."""
    return OrderedNetwork(**settings)


def check(in_chans: Any, width: Any, blocks: Any, stem_stride: Any, attention_after: Any, attention: Any) -> None:
    """Raises ValueError for a setting that the ordered network cannot have."""
    for key, value in {"in_chans": in_chans, "width": width, "blocks": blocks}.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}={value}: expected a whole number of 1 or more")
    if stem_stride not in (1, 2) or stem_stride is True:
        raise ValueError(f"stem_stride={stem_stride}: expected 1 or 2")
    if attention_after not in range(blocks + 1) or isinstance(attention_after, bool):
        raise ValueError(
            f"attention_after={attention_after}: expected the number of a block, 1 to {blocks} (blocks), or 0 for none"
        )
    if attention not in ATTENTION:
        raise ValueError(f"attention={attention}: not one of {', '.join(ATTENTION)}")


@contextmanager
def reading(network: OrderedNetwork, *orders: int) -> Iterator[None]:
    """Inside, the network reads pictures in these orders, one after the other along the batch; outside in order 0."""
    network.orders = orders
    try:
        yield
    finally:
        network.orders = (0,)
