"""A training step of STEGO and its table of neighbours beside the formulation of the release, in one run.

`python -m benchmarks.stego [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

step: backbone on pictures and their neighbours, head, three kinds of pairs with five negatives, backward and Adam. The
plain side materialises the attention of every block and goes picture set by picture set, as released, in float32; ours
is the method's own loss. table: 50,000 vectors, 30 neighbours; the plain side takes a sixteenth at a time.
"""

import math
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks.harness import ROOT, Piece, extrapolated, run
from losses import correspondence
from losses.correspondence import Term, correspondence_loss
from models import feature_store
from models.backbone import Backbone
from models.feature_store import Layout
from models.heads import SegmentationHead, channel_masks, drop_channels
from retrieval import neighbours

TERMS = {"self": Term(0.67, 0.18), "knn": Term(0.25, 0.12), "random": Term(0.63, 0.46)}
SAMPLES, NEGATIVES, DROPOUT = 11, 5, 0.1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Step:
    """Backbone, head, pictures and draws of one step; the same on both sides."""

    def __init__(self, backbone: str, size: int, pictures: int, precision: str = "float32"):
        cfg = OmegaConf.load(ROOT / "configs" / "backbone" / f"{backbone}.yaml")
        cfg.levels = None
        cfg.weights, cfg.precision = "none", precision
        self.backbone = Backbone(cfg, seed=0).to(DEVICE)
        torch.manual_seed(0)
        self.head = SegmentationHead(self.backbone.dim, 70).to(DEVICE)
        self.optimizer = torch.optim.Adam(self.head.parameters(), lr=0.0)  # every repetition is the same step
        self.images, self.near = torch.rand(2, pictures, 3, size, size).to(DEVICE)
        self.points = [correspondence.random_points(0, name, 0, pictures, SAMPLES).to(DEVICE) for name in "ab"]
        self.negatives = correspondence.random_negatives(0, 0, NEGATIVES, pictures).to(DEVICE)

    def dropped(self, maps: Tensor, use: str) -> tuple[Tensor, Tensor]:
        """Features as the loss sees them, and codes: three draws of channel dropout."""
        masks = [
            channel_masks(0, f"{use}.{name}", 0, *maps.shape[:2], DROPOUT, DEVICE)
            for name in ("linear", "nonlinear", "signal")
        ]
        return drop_channels(maps, masks[2]), self.head(maps, tuple(masks[:2]))

    def learn(self, total: Tensor) -> float:
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()
        return total.item()


def step_ours(backbone: str, size: int, pictures: int, precision: str) -> Callable[[], float]:
    step = Step(backbone, size, pictures, precision)

    def work() -> float:
        image, near = (step.backbone.features(pictures).concat() for pictures in (step.images, step.near))
        return step.learn(ours(step, image, near))

    return work


def ours(step: Step, image: Tensor, near: Tensor) -> Tensor:
    """The method's loss on frozen features of the pictures and of their neighbours."""
    signal, codes = step.dropped(image, "image")
    near, points, pool = step.dropped(near, "near"), tuple(step.points), (signal, codes)
    return correspondence_loss(signal, codes, near, pool, points, step.negatives, TERMS).total


def step_plain(backbone: str, size: int, pictures: int, precision: str) -> Callable[[], float]:
    """`precision` is that of our side: the release knows float32 alone."""
    step = Step(backbone, size, pictures)
    for block in step.backbone.net.blocks:
        block.attn.fused_attn = False

    def unit(maps: Tensor) -> Tensor:
        return F.normalize(maps, dim=1, eps=correspondence.EPS)

    def helper(f: Tensor, g: Tensor, s: Tensor, t: Tensor, shift: float) -> Tensor:
        with torch.no_grad():
            wanted = torch.einsum("nchw,ncij->nhwij", unit(f), unit(g))
            mean = wanted.mean()
            wanted = wanted - wanted.mean([3, 4], keepdim=True)
            wanted = wanted - wanted.mean() + mean
        return -torch.einsum("nchw,ncij->nhwij", unit(s), unit(t)).clamp(0) * (wanted - shift)

    def work() -> float:
        features, codes = step.dropped(step.backbone.features(step.images).map, "image")
        near_features, near_codes = step.dropped(step.backbone.features(step.near).map, "near")
        first, second = step.points
        f, s = correspondence.sample(features, first), correspondence.sample(codes, first)
        g, t = correspondence.sample(near_features, second), correspondence.sample(near_codes, second)
        losses = []
        for chosen in step.negatives:
            other, code = correspondence.sample(features[chosen], second), correspondence.sample(codes[chosen], second)
            losses.append(helper(f, other, s, code, TERMS["random"].shift))
        total = TERMS["random"].weight * torch.cat(losses).mean()
        total = total + TERMS["self"].weight * helper(f, f, s, s, TERMS["self"].shift).mean()
        return step.learn(total + TERMS["knn"].weight * helper(f, g, s, t, TERMS["knn"].shift).mean())

    return work


def step_kept(backbone: str, size: int, pictures: int, precision: str) -> Callable[[], float]:
    """Our step with `backbone.cache_features`: features come from a file, with the reading of it."""
    step = Step(backbone, size, pictures, precision)
    both = step.backbone.features(torch.cat([step.images, step.near]))
    path = Path(tempfile.mkdtemp()) / "kept.features"
    numbers = torch.arange(2 * pictures)
    what, device = "pictures of the benchmark", torch.device(DEVICE)
    store = feature_store.provide(path, len(numbers), Layout.of(both), [(numbers, both)], what, device)
    weakref.finalize(step, shutil.rmtree, path.parent)

    def work() -> float:
        image, near = (store.features(chosen, device).concat() for chosen in numbers.chunk(2))
        return step.learn(ours(step, image, near))

    return work


def vectors(pictures: int, dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(pictures, dim, generator=generator), dim=1).to(DEVICE)


def table_ours(pictures: int, dim: int, stored: int, parts: int) -> Callable[[], float]:
    rows, items = vectors(pictures, dim), torch.arange(pictures)
    return lambda: float(neighbours.table(rows, items, pictures, stored).double().mean())


def table_plain(pictures: int, dim: int, stored: int, parts: int) -> Callable[[], float]:
    """The first of `parts` of the work, extrapolated."""
    rows = vectors(pictures, dim)

    def work() -> float:
        torch.topk(rows[: pictures // parts] @ rows.T, stored + 1)
        return math.nan

    return extrapolated(work, parts)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the published sizes or at tiny ones."""
    module = "benchmarks.stego"
    size = {"backbone": "tiny", "size": 48, "pictures": 2} if quick else {}
    size = size or {"backbone": "dino_vits8", "size": 224, "pictures": 8}
    rows = {"pictures": 64 if quick else 50_000, "dim": 384, "stored": 5 if quick else 30, "parts": 16}
    name = f"step, {size['pictures']} pictures of {size['size']} px"
    chosen = [
        Piece(f"{name}, float32", module, "step_plain", "step_ours", size | {"precision": "float32"}, 1.25),
        Piece(f"{name}, bf16 backbone", module, "step_plain", "step_ours", size | {"precision": "bf16"}, 3.0),
        Piece(
            f"{name}, features kept in a file", module, "step_ours", "step_kept", size | {"precision": "float32"},
            note="beside ours without; an epoch is as many times faster",
        ),
        Piece(
            f"table of neighbours, {rows['pictures']} x {rows['dim']}, k = {rows['stored']}",
            module, "table_plain", "table_ours", rows, note="plain extrapolated from a sixteenth",
        ),
    ]  # fmt: skip
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("stego", __doc__, pieces, "step, table, float32, bf16, kept", words)


if __name__ == "__main__":
    sys.exit(main())
