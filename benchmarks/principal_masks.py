"""Principal masks by covariances and a symmetric solver beside the released way, subspace iterations over the samples.

`python -m benchmarks.principal_masks [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

All rounds of the masks of pictures, without the CRF, in float32. Features have the size of a ViT-S's at stride 8 on
320 px; drawn are regions with a direction each, a direction that all share, and noise. eight: eight pictures in a call.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Piece, run
from grouping import principal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
THRESHOLD = 0.4
REGIONS = 6
COMPONENTS, ITERATIONS = 3, 100
"""Of the released decomposition."""


def inputs(pictures: int, side: int, channels: int) -> Tensor:
    """Features [B,C,h,w]: places belong to the nearest of REGIONS centres."""
    draws = torch.Generator().manual_seed(0)
    centres = torch.rand(pictures, REGIONS, 2, generator=draws) * side
    axis = torch.arange(side) + 0.5
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(1, -1, 2)
    region = torch.cdist(places.expand(pictures, -1, -1), centres).argmin(2)
    directions = torch.randn(pictures, REGIONS, channels, generator=draws)
    common = 0.5 * torch.randn(1, 1, channels, generator=draws)
    features = directions.gather(1, region[..., None].expand(-1, -1, channels)) + common
    features = features + 0.7 * torch.randn(features.shape, generator=draws)
    return features.mT.unflatten(2, (side, side)).contiguous().to(DEVICE)


def answer(masks: list[Tensor]) -> float:
    """A number that feels the order of the masks and the places in them."""
    weights = torch.linspace(1, 2, masks[0][0].numel(), device=masks[0].device).view_as(masks[0][0])
    return sum(float((part * weights).sum() * (n + 1)) for stack in masks for n, part in enumerate(stack))


def ours(pictures: int, side: int, channels: int) -> Callable[[], float]:
    maps = inputs(pictures, side, channels)
    return lambda: answer([stack.masks for stack in principal.principal_masks(maps, THRESHOLD)])


def plain(pictures: int, side: int, channels: int) -> Callable[[], float]:
    maps = inputs(pictures, side, channels)
    return lambda: answer([_released(picture) for picture in maps])


def _released(maps: Tensor) -> Tensor:
    """The masks [T,h,w] of one picture [C,h,w]; directions towards the mean of what is left, as on the other side."""
    unit = F.normalize(maps, dim=0)
    free = torch.ones(maps.shape[1:], dtype=torch.bool, device=maps.device)
    found: list[Tensor] = []
    while (~free).float().mean() < principal.LEFT_OUT:
        samples = maps[:, free].T
        direction = torch.pca_lowrank(samples, q=COMPONENTS, niter=ITERATIONS)[2][:, 0]
        if direction @ samples.mean(0) < 0:
            direction = -direction
        scores = torch.einsum("c,chw->hw", direction, unit).masked_fill(~free, -torch.inf)
        row, column = divmod(int(scores.flatten().argmax()), maps.shape[2])
        near = torch.einsum("c,chw->hw", unit[:, row, column], unit) * free
        near[near < THRESHOLD * near.max()] = 0
        found.append(near / near.max())
        free &= near <= 0
    return torch.stack(found)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the sizes that are asked for or at tiny ones."""
    one = {"pictures": 1, "side": 40, "channels": 384}
    if quick:
        one |= {"side": 12, "channels": 24}
    name, module = f"{one['side']} x {one['side']} x {one['channels']}", "benchmarks.principal_masks"
    chosen = [
        Piece(f"masks, {name}", module, "plain", "ours", one, 4.0),
        Piece(f"eight pictures, {name}", module, "plain", "ours", one | {"pictures": 8}, 4.0),
    ]
    return [replace(piece, faster=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("principal_masks", __doc__, pieces, "masks, eight", words)


if __name__ == "__main__":
    sys.exit(main())
