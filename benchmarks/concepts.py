"""Concept maps beside one backward pass a concept, in one run.

`python -m benchmarks.concepts [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

Pictures to the maps of all concepts, the backbone's forward pass included, random weights. plain: as released, with
the attention of the last block as a matrix, weights that require gradients, and a backward pass through the whole
network for every concept; the first `shown` concepts are computed and their time beyond the forward pass is multiplied.
The answer of both sides is the mean of the maps of these concepts.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn

from benchmarks.harness import ROOT, Piece, extrapolated, run
from grouping.concepts import concept_maps
from lightning_modules.transfgu.steps import maps_of
from models.backbone import Backbone
from models.class_token import class_path
from models.vit.attention import unfused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHARE = 0.8


def inputs(backbone: str, size: int, pictures: int, concepts: int) -> tuple[Backbone, Tensor, Tensor]:
    """A frozen network of random weights, pictures, centroids."""
    cfg = OmegaConf.load(ROOT / "configs" / "backbone" / f"{backbone}.yaml")
    cfg.weights, cfg.pretraining, cfg.levels = "none", None, None
    network = Backbone(cfg).to(DEVICE)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(pictures, 3, size, size, generator=generator)
    centroids = torch.randn(concepts, network.dim, generator=generator)
    return network, images.to(DEVICE), centroids.to(DEVICE)


def maps_ours(backbone: str, size: int, pictures: int, concepts: int, shown: int) -> Callable[[], float]:
    network, images, centroids = inputs(backbone, size, pictures, concepts)

    def work() -> float:
        with torch.no_grad():
            maps = maps_of(class_path(network, images, "class"), centroids, pictures, SHARE)
        return float(maps[:, :shown].double().mean())

    return work


def maps_plain(backbone: str, size: int, pictures: int, concepts: int, shown: int) -> Callable[[], float]:
    network, images, centroids = inputs(backbone, size, pictures, concepts)
    net, units = network.net.requires_grad_(True), F.normalize(centroids, dim=1)
    last = net.blocks[-1].attn
    kept: list[Tensor] = []

    def keep(_: nn.Module, __: tuple, attention: Tensor) -> None:
        attention.retain_grad()
        kept.append(attention)

    last.attn_drop.register_forward_hook(keep)

    def work() -> float:
        kept.clear()
        started = time.perf_counter()
        with unfused(net):
            token = net.forward_features((images - network.mean) / network.std)[:, 0]
        attention, found = kept[-1], []
        forward = time.perf_counter() - started
        for unit in units[:shown]:
            net.zero_grad()
            attention.grad = None
            (1 - F.normalize(token, dim=1) @ unit).mean().backward(retain_graph=True)
            gradient = attention.grad[:, :, 0, 1:].mean(1)
            found.append(concept_maps(attention[:, :, 0], gradient[:, None], SHARE))
        seconds = time.perf_counter() - started
        work.factor = (forward + (seconds - forward) * concepts / shown) / seconds
        return float(torch.cat(found, 1).double().mean())

    return extrapolated(work, concepts / shown)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the published size or at a tiny one."""
    size = {"backbone": "dino_vits8", "size": 320, "pictures": 2, "concepts": 27, "shown": 3}
    if quick:
        size = {"backbone": "tiny", "size": 48, "pictures": 2, "concepts": 5, "shown": 5}
    name = f"concept maps, {size['pictures']} pictures of {size['size']} px, {size['concepts']} concepts"
    note = "" if quick else f"plain extrapolated from {size['shown']} concepts"
    piece = Piece(name, "benchmarks.concepts", "maps_plain", "maps_ours", size, 50.0, 10.0, note)
    return [replace(piece, faster=None, smaller=None) if quick else piece]


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("concepts", __doc__, pieces, "concept, maps", words)


if __name__ == "__main__":
    sys.exit(main())
