"""The energy of SmooSeg from sums over pictures beside its plain formulation over pairs of patches, in one run.

`python -m benchmarks.smoothness [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

Both energies of a batch, forward and backward to the soft labels, in float32: pictures of 224 px at stride 8, 27
clusters. large: pictures of 448 px, where the plain side holds four times the patches, so sixteen times the pairs.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.harness import Piece, run
from losses import smoothness as loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHIFTS = {"within": -0.02, "across": 0.5}


def inputs(pictures: int, side: int, channels: int, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B,C,h,w], cosines to prototypes [B,K,h,w], partners [B]."""
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(pictures, channels, side, side, generator=draws) + 0.3
    cosines = torch.rand(pictures, clusters, side, side, generator=draws) * 2 - 1
    return features.to(DEVICE), cosines.to(DEVICE), torch.arange(pictures, device=DEVICE).roll(1)


def _step(cosines: Tensor, energies: Callable[[Tensor], list[Tensor]]) -> float:
    """Forward and backward; a number that holds energies and gradient."""
    leaf = cosines.detach().requires_grad_()
    total = sum(energies(loss.soft_labels(leaf, 0.1)))
    total.backward()
    return total.item() + float(torch.linalg.vector_norm(leaf.grad))


def ours(pictures: int, side: int, channels: int, clusters: int) -> Callable[[], float]:
    features, cosines, partners = inputs(pictures, side, channels, clusters)
    return lambda: _step(
        cosines, lambda labels: list(loss.smoothness(features, labels, partners, SHIFTS).energies.values())
    )


def plain(pictures: int, side: int, channels: int, clusters: int) -> Callable[[], float]:
    features, cosines, partners = inputs(pictures, side, channels, clusters)

    def energies(labels: Tensor) -> list[Tensor]:
        pairs = ((features, labels, SHIFTS["within"]), (features[partners], labels[partners], SHIFTS["across"]))
        return [loss.pair_energy((features, other), (labels, soft), b)[0].mean() for other, soft, b in pairs]

    return lambda: _step(cosines, energies)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the sizes that are asked for or at tiny ones."""
    small = {"pictures": 4, "side": 28, "channels": 384, "clusters": 27}
    large = small | {"side": 56}
    if quick:
        small, large = small | {"side": 6, "channels": 8}, large | {"side": 8, "channels": 8}
    chosen = [
        Piece(f"energy, 4 x {small['side']} x {small['side']}", "benchmarks.smoothness", "plain", "ours", small, 8.0),
        Piece(
            f"large energy, 4 x {large['side']} x {large['side']}",
            "benchmarks.smoothness",
            "plain",
            "ours",
            large,
            8.0,
            8.0,
        ),
    ]
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("smoothness", __doc__, pieces, "energy, large", words)


if __name__ == "__main__":
    sys.exit(main())
