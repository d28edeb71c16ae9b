"""Small networks on top of a backbone: the head of STEGO and HP, HP's projection head, the prototypes of PriMaPs.

Channel dropout is passed in as masks instead of being drawn inside. So a mask belongs to a (seed, step, picture), is
the same on any number of ranks, and the caller decides which uses share a draw.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import chance, distributed
from common.errors import ConfigError
from common.precision import real, real_dtype


def channel_masks(
    seed: int, purpose: str, step: int, batch_global: int, channels: int, p: float, device: torch.device | str = "cpu"
) -> Tensor:
    """Masks of channel dropout for a global batch: [B_global, C] float32, 0 or 1 / (1 - p), so that the mean is kept.

    One draw belongs to (seed, purpose, step); rows are positions in the global batch. A rank takes its own rows with
    `common.distributed.own_slice`. Drawn on the CPU, so every device sees the same mask.

    Raises:
        ConfigError: p outside [0, 1).
    """
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"channel dropout p = {p}: must lie in [0, 1); use 0 to switch it off")
    uniform = torch.rand(batch_global, channels, generator=chance.generator(seed, purpose, step))
    return (uniform >= p).float().div_(1.0 - p).to(device)


def own_channel_masks(seed: int, purpose: str, step: int, maps: Tensor, p: float) -> Tensor | None:
    """This rank's rows [B,C] of the masks that are drawn for the global batch of maps [B,C,h,w]; None where p is 0."""
    if p == 0:
        return None
    pictures, channels = maps.shape[0] * distributed.world_size(), maps.shape[1]
    return distributed.own_slice(channel_masks(seed, purpose, step, pictures, channels, p, maps.device))


def own_element_masks(
    seed: int, purpose: str, step: int, shape: Sequence[int], p: float, device: torch.device
) -> Tensor | None:
    """Masks of dropout of single elements, float32 [B,...] of this rank's pictures, 0 or 1 / (1 - p); None for p 0.

    One draw belongs to (seed, purpose, step, position in the global batch), on the device itself: attention weights
    have millions of elements. CPU and GPU draw different ones.
    """
    if p == 0:
        return None
    pictures, *rest = shape
    first = pictures * distributed.rank()
    uniform = torch.empty(pictures, *rest, device=device)
    for row, position in zip(uniform, range(first, first + pictures), strict=True):
        row.uniform_(generator=chance.generator(seed, purpose, step, position, device=device))
    return (uniform >= p).float().div_(1.0 - p)


def drop_channels(features: Tensor, mask: Tensor | None) -> Tensor:
    """Multiply maps [B,C,h,w] or rows [m,C] with a mask of channels [B,C] or [m,C], or of the maps' own shape; None
    leaves them as they are."""
    if mask is None:
        return features
    return features * mask.to(features.dtype).reshape(*mask.shape, *[1] * (features.dim() - mask.dim()))


def patch_rows(maps: Tensor) -> Tensor:
    """Maps [B,D,h,w] -> rows [B*h*w, D], picture by picture, row-major inside a picture."""
    return maps.flatten(2).transpose(1, 2).reshape(-1, maps.shape[1])


class SegmentationHead(nn.Module):
    """s = W1 drop(f) + W3 a(W2 drop(f)), all 1x1 convolutions with bias; two dropout draws, one a use of f.

    The activation a is a ReLU, in SmooSeg a SiLU. The second term is left out with `nonlinear=False`. Source: STEGO
    (ICLR 2022) section 4; HP (CVPR 2023); SmooSeg (NeurIPS 2023).
    """

    def __init__(self, in_dim: int, dim: int, nonlinear: bool = True, activation: type[nn.Module] = nn.ReLU):
        super().__init__()
        self.in_dim, self.dim = in_dim, dim
        self.linear = nn.Conv2d(in_dim, dim, 1)
        self.nonlinear = (
            nn.Sequential(nn.Conv2d(in_dim, in_dim, 1), activation(), nn.Conv2d(in_dim, dim, 1)) if nonlinear else None
        )

    def forward(self, features: Tensor, masks: tuple[Tensor | None, Tensor | None] | None = None) -> Tensor:
        """Codes of maps [B,C,h,w] -> [B,D,h,w], or of single patches [m,C] -> [m,D].

        `masks`: dropout masks for the linear and the non-linear term, of channels [B,C] (or [m,C]) or of elements, in
        the shape of the features; None drops nothing.
        """
        first, second = masks if masks is not None else (None, None)
        codes = _pointwise(self.linear, drop_channels(features, first))
        if self.nonlinear is not None:
            inner, activation, outer = self.nonlinear
            codes = codes + _pointwise(outer, activation(_pointwise(inner, drop_channels(features, second))))
        return codes


class ProjectionHead(nn.Module):
    """z = normalise(Linear(s)): the space of the contrastive and the consistency loss. Source: HP (CVPR 2023)."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, codes: Tensor) -> Tensor:
        """Rows [N,D], or maps [B,D,h,w] in the order of `patch_rows` -> unit rows [N,D]."""
        return F.normalize(self.linear(patch_rows(codes) if codes.dim() == 4 else codes), dim=-1)


class PrototypeHead(nn.Module):
    """Logits g_k <z, d_k / |d_k|> of K classes, without bias; codes are not normalised. Source: PriMaPs (TMLR 2024).

    The length of a direction does not show in the logits, but a step of Adam turns a long one less.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(classes, dim))
        self.gain = nn.Parameter(torch.ones(classes))

    def forward(self, codes: Tensor) -> Tensor:
        """Codes [B,D,h,w] -> logits [B,K,h,w]: float32 (float64 for float64 codes), also inside autocast."""
        with torch.autocast(codes.device.type, enabled=False):
            weight = F.normalize(self.direction, dim=1) * self.gain[:, None]
            return torch.matmul(weight.to(real_dtype(codes)), real(codes).flatten(2)).unflatten(2, codes.shape[2:])

    @torch.no_grad()
    def start(self, directions: Tensor) -> None:
        """Take directions [K,D] as they are, every gain 1."""
        self.direction.copy_(directions)
        self.gain.fill_(1.0)


def _pointwise(layer: nn.Conv2d, features: Tensor) -> Tensor:
    """A 1x1 convolution on maps, or the same matrix on rows."""
    if features.dim() == 2:
        return F.linear(features, layer.weight.flatten(1), layer.bias)
    return layer(features)
