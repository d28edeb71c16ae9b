"""Pixel sorting and the vMF-NCA loss of SegSort beside the formulation of the release, in float32, in one run.

`python -m benchmarks.segments [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

sorting: unit embeddings with location, 25 clusters, 10 rounds, cut by regions; the plain side goes picture by picture
and renumbers with `unique`. loss: forward and backward, gradient to pixels and prototypes; the plain side holds several
pixels x prototypes matrices. large loss: the plain side takes a tenth of the pixels.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Piece, extrapolated, run
from grouping import segments
from losses.vmf import vmf_nca

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KAPPA = 16.0


def sorting_inputs(pictures: int, side: int, dim: int) -> tuple[Tensor, Tensor]:
    """Smooth embeddings with noise [B,D,h,w], and regions: a 3 x 3 pattern [B,h,w]."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(pictures, dim, 7, 7, generator=generator)
    maps = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    maps = maps + 0.1 * torch.randn(maps.shape, generator=generator)
    regions = segments.grid_labels((side, side), (3, 3), "ceil").expand(pictures, -1, -1)
    return maps.to(DEVICE), regions.contiguous().to(DEVICE)


def sorting_ours(pictures: int, side: int, dim: int, clusters: int, rounds: int) -> Callable[[], float]:
    maps, regions = sorting_inputs(pictures, side, dim)

    def work() -> float:
        found = segments.sort_pixels(maps, (clusters, clusters), rounds, regions=regions, empty="zero")
        return float(found.ids.double().mean())

    return work


def sorting_plain(pictures: int, side: int, dim: int, clusters: int, rounds: int) -> Callable[[], float]:
    maps, regions = sorting_inputs(pictures, side, dim)
    axis = torch.linspace(0, clusters - 1, side, device=DEVICE).round().long()
    grid = (axis[:, None] + clusters * axis[None, :]).flatten()
    line = torch.linspace(0, 1, side, device=DEVICE) - 0.5
    places = torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1).flatten(0, 1)

    def work() -> float:
        unit = F.normalize(maps.flatten(2).mT, dim=2)
        whole = []
        for number, (rows, own) in enumerate(zip(unit, regions.flatten(1), strict=True)):
            located = F.normalize(torch.cat([rows, places], dim=1), dim=1)
            labels = grid.unique(return_inverse=True)[1]
            count = int(labels.max()) + 1
            for _ in range(rounds):
                sums = torch.zeros(count, located.shape[1], device=DEVICE)
                sums.scatter_add_(0, labels[:, None].expand_as(located), located)
                labels = (located @ (sums / sums.norm(dim=1, keepdim=True).clamp(min=1e-12)).T).argmax(1)
            whole.append((labels + number * count) * 2048 + own)
        ids = torch.cat(whole).unique(return_inverse=True)[1]
        return float(ids.double().mean())

    return work


def loss_inputs(pixels: int, prototypes: int, dim: int, labels: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unit prototypes, pixels around them, labels of prototypes, own segments."""
    generator = torch.Generator().manual_seed(0)
    bank = F.normalize(torch.randn(prototypes, dim, generator=generator), dim=1)
    own = torch.randint(prototypes, (pixels,), generator=generator)
    rows = F.normalize(bank[own] + 0.1 * torch.randn(pixels, dim, generator=generator), dim=1)
    kinds = torch.randint(labels, (prototypes,), generator=generator)
    return rows.to(DEVICE), bank.to(DEVICE), kinds.to(DEVICE), own.to(DEVICE)


def _step(rows: Tensor, bank: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Forward and backward; a number that holds loss and gradients."""
    leaves = [part.detach().requires_grad_() for part in (rows, bank)]
    loss = function(*leaves)
    loss.backward()
    return loss.item() + sum(float(torch.linalg.vector_norm(leaf.grad)) for leaf in leaves)


def loss_ours(pixels: int, prototypes: int, dim: int, labels: int, parts: int = 1) -> Callable[[], float]:
    rows, bank, kinds, own = loss_inputs(pixels, prototypes, dim, labels)
    return lambda: _step(rows, bank, lambda x, p: vmf_nca(x, p, kinds, own, KAPPA))


def loss_plain(pixels: int, prototypes: int, dim: int, labels: int, parts: int = 1) -> Callable[[], float]:
    """The first of `parts` of the pixels, extrapolated."""
    rows, bank, kinds, own = loss_inputs(pixels, prototypes, dim, labels)
    rows, own = rows[: pixels // parts], own[: pixels // parts]

    def released(x: Tensor, p: Tensor) -> Tensor:
        terms = (KAPPA * (x @ p.T)).exp()
        same = (kinds[own][:, None] == kinds[None, :]).float()
        mine = terms.gather(1, own[:, None]).squeeze(1)
        above = (terms * same).sum(1) - mine
        above = torch.where(above > 0, above, mine)
        return -(above / (above + (terms * (1 - same)).sum(1))).log().mean()

    if parts == 1:
        return lambda: _step(rows, bank, released)

    def work() -> float:
        _step(rows, bank, released)
        return float("nan")

    return extrapolated(work, parts)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the sizes that are asked for or at tiny ones."""
    module = "benchmarks.segments"
    small = {"pictures": 8, "side": 28, "dim": 128, "clusters": 5, "rounds": 10}
    large = small | {"side": 56}
    loss = {"pixels": 20_000, "prototypes": 2_000, "dim": 128, "labels": 27}
    huge = {"pixels": 100_000, "prototypes": 4_000, "dim": 128, "labels": 27, "parts": 10}
    if quick:
        small, large = small | {"side": 8, "dim": 8}, small | {"side": 12, "dim": 8}
        loss, huge = loss | {"pixels": 200, "prototypes": 40}, huge | {"pixels": 400, "prototypes": 50}

    def named(shape: dict[str, int]) -> str:
        return f"{shape['pixels']} x {shape['prototypes']}"

    chosen = [
        Piece(f"sorting, 8 x {small['side']} x {small['side']}", module, "sorting_plain", "sorting_ours", small, 1.0),
        Piece(f"sorting, 8 x {large['side']} x {large['side']}", module, "sorting_plain", "sorting_ours", large, 1.0),
        Piece(f"loss, {named(loss)}", module, "loss_plain", "loss_ours", loss, 1 / 0.75, 15.0),
        Piece(
            f"large loss, {named(huge)}", module, "loss_plain", "loss_ours", huge,
            note="plain: time extrapolated from a tenth of the pixels, memory of that tenth; ours within 1024 MiB",
        ),
    ]  # fmt: skip
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("segments", __doc__, pieces, "sorting, loss, large", words)


if __name__ == "__main__":
    sys.exit(main())
