"""The read-out of codes and the dense CRF beside the released order of operations, in float32, in one run.

`python -m benchmarks.evaluation [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

read-out: codes [4,512,40,40] to 320 px, linear and cluster probe, arg max and counts. The plain side enlarges the codes
first. crf: two read-outs of one picture; the plain side refines each by itself with lattices made anew, ours
shares the lattice of the picture and keeps that of its size.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Piece, run
from evaluation import readout
from evaluation.crf import DenseCRF
from evaluation.metrics import SegmentationScore
from evaluation.probes import ClusterProbe, LinearProbe

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Inputs:
    """Smooth codes, labels and both probes; the same on both sides."""

    def __init__(self, pictures: int, dim: int, grid: int, size: int, classes: int):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(pictures, dim, max(2, grid // 4), max(2, grid // 4), generator=generator)
        self.codes = F.interpolate(coarse, size=(grid, grid), mode="bilinear").to(DEVICE)
        self.label = torch.randint(classes, (pictures, size, size), generator=generator).to(DEVICE)
        self.size = (size, size)
        self.linear, self.cluster = LinearProbe(dim, classes).to(DEVICE), ClusterProbe(dim, classes).to(DEVICE)
        self.scores = [SegmentationScore(classes, classes).to(DEVICE) for _ in range(2)]

    def count(self, predictions: list[Tensor]) -> float:
        """A number that tells how all pixels were counted."""
        total = 0.0
        for score, prediction in zip(self.scores, predictions, strict=True):
            score.reset()
            score.update(prediction, self.label)
            weights = torch.arange(score.counts.numel(), device=DEVICE).view_as(score.counts)
            total += float((score.counts * weights).double().sum())
        return total


@torch.no_grad()
def readout_ours(**shape: int) -> Callable[[], float]:
    inputs = Inputs(**shape)

    @torch.no_grad()
    def work() -> float:
        maps = [inputs.linear(inputs.codes), inputs.cluster.scores(inputs.codes)]
        return inputs.count([readout.predict(values, inputs.size) for values in maps])

    return work


@torch.no_grad()
def readout_plain(**shape: int) -> Callable[[], float]:
    inputs = Inputs(**shape)

    @torch.no_grad()
    def work() -> float:
        codes = F.interpolate(inputs.codes, size=inputs.size, mode="bilinear", align_corners=False)
        logits = inputs.linear.classifier(codes).log_softmax(1)
        unit, centroids = F.normalize(codes, dim=1), F.normalize(inputs.cluster.clusters, dim=1)
        cosines = torch.einsum("bdhw,kd->bkhw", unit, centroids).mul(2).log_softmax(1)
        return inputs.count([logits.argmax(1), cosines.argmax(1)])

    return work


def crf_inputs(size: int, classes: int) -> tuple[Tensor, list[Tensor]]:
    """A picture with areas, shading and noise, uint8 [1,3,H,W], and log-probabilities of two read-outs."""
    generator = torch.Generator().manual_seed(0)
    areas = F.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size=(size, size), mode="nearest")
    shade = F.interpolate(torch.rand(1, 3, 3, 3, generator=generator), size=(size, size), mode="bilinear")
    noise = torch.randn(1, 3, size, size, generator=generator)
    image = (180 * areas + 60 * shade + 3 * noise).clamp(0, 255).to(torch.uint8)
    maps = [
        F.interpolate(2 * torch.randn(1, classes, 10, 10, generator=generator), size=(size // 8, size // 8))
        for _ in range(2)
    ]
    return image.to(DEVICE), [part.log_softmax(1).to(DEVICE) for part in maps]


def crf_ours(size: int, classes: int) -> Callable[[], float]:
    image, maps = crf_inputs(size, classes)
    field = DenseCRF()
    return lambda: float(sum(part.argmax(1).sum() for part in field(image, maps)))


def crf_plain(size: int, classes: int) -> Callable[[], float]:
    image, maps = crf_inputs(size, classes)
    return lambda: float(sum(DenseCRF()(image, [part])[0].argmax(1).sum() for part in maps))


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the published sizes or at tiny ones."""
    module = "benchmarks.evaluation"
    read = {"pictures": 2, "dim": 16, "grid": 6, "size": 48, "classes": 5}
    field = {"size": 32, "classes": 4}
    if not quick:
        read = {"pictures": 4, "dim": 512, "grid": 40, "size": 320, "classes": 27}
        field = {"size": 320, "classes": 27}
    chosen = [
        Piece(f"read-out, {read['pictures']} pictures", module, "readout_plain", "readout_ours", read, 20.0, 20.0),
        Piece(f"crf, {field['size']} px, two read-outs", module, "crf_plain", "crf_ours", field),
    ]
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("evaluation", __doc__, pieces, "read-out, crf", words)


if __name__ == "__main__":
    sys.exit(main())
