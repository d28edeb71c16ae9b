"""IIC's loss from products of spectra beside its plain formulation, a convolution whose kernel is the other picture.

`python -m benchmarks.scratch.information [--threads T] [--repeats R] [--allocator default|tuned] [--quick]`

Forward and backward to both maps, float32, no mask, the copies as they are: 8 pictures, 27 classes, 64 x 64 pixels,
shifts of up to 10 px.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Piece, run
from losses import information

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def by_convolution(first: Tensor, second: Tensor, half_side: int) -> Tensor:
    """`joint_of_shifts` as the release has it: classes take the place of pictures, pictures that of channels."""
    joint = F.conv2d(first.transpose(0, 1), second.transpose(0, 1), padding=half_side)
    return joint.permute(2, 3, 0, 1).flatten(0, 1)


def _work(joint: Callable, pictures: int, classes: int, side: int, half_side: int) -> Callable[[], float]:
    draws = torch.Generator().manual_seed(0)
    logits = torch.randn(2, pictures, classes, side, side, generator=draws)
    maps = (logits[0].softmax(1).to(DEVICE), (logits[0] + logits[1]).softmax(1).to(DEVICE))

    def step() -> float:
        """A number that holds the loss and both gradients."""
        leaves = [values.detach().requires_grad_() for values in maps]
        loss = information.information(joint(*leaves, half_side), balance=1.5).loss
        loss.backward()
        return loss.item() + sum(float(torch.linalg.vector_norm(leaf.grad)) for leaf in leaves)

    return step


def ours(**settings: int) -> Callable[[], float]:
    return _work(information.joint_of_shifts, **settings)


def plain(**settings: int) -> Callable[[], float]:
    return _work(by_convolution, **settings)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the size that is asked for or at a tiny one."""
    settings = {"pictures": 8, "classes": 27, "side": 64, "half_side": 10}
    if quick:
        settings |= {"pictures": 2, "classes": 5, "side": 12, "half_side": 3}
    name = f"joint, {settings['pictures']} x {settings['classes']} x {settings['side']} x {settings['side']}"
    piece = Piece(name, "benchmarks.scratch.information", "plain", "ours", settings, 7.0)
    return [replace(piece, faster=None) if quick else piece]


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("scratch.information", __doc__, pieces, "joint", words)


if __name__ == "__main__":
    sys.exit(main())
