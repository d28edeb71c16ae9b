"""Graph cuts beside the formulation of the releases, in one run.

`python -m benchmarks.spectral [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

token cut: features of one picture to its bipartition, affinity included; plain: a dense float64 solution of the
generalised problem for the second and third vector. mask cut: the same three times over, with the patches of the masks
blanked out in between. segments: 15 eigenvectors (residual 1e-5) of given affinities, a batch of pictures or one;
plain: picture by picture, shift-invert around zero. The answer of `token cut` is the share of patches in the
bipartition (difference 0: the same one but for patches that trade places), that of `mask cut` the share in the masks,
that of `segments` the sum of the eigenvalues.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Piece, run
from grouping import eigen, maskcut, spectral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TAU, EPS = 0.2, 1e-5


def inputs(pictures: int, side: int, dim: int) -> Tensor:
    """Features [B,N,C] of pictures with smooth structure, noise and what all patches have in common."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(pictures, dim, 8, 8, generator=generator)
    maps = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    maps = maps + 0.5 * torch.randn(maps.shape, generator=generator)
    maps = maps + 0.4 * torch.randn(pictures, dim, 1, 1, generator=generator)
    return maps.flatten(2).mT.contiguous().to(DEVICE)


def cut_ours(side: int, dim: int) -> Callable[[], float]:
    rows = inputs(1, side, dim)

    def work() -> float:
        cut = spectral.token_cut(spectral.threshold_affinity(rows, TAU, EPS), (side, side))
        return float(cut.bipartition.double().mean())

    return work


def cut_plain(side: int, dim: int) -> Callable[[], float]:
    rows = inputs(1, side, dim)

    def work() -> float:
        unit = F.normalize(rows[0], dim=1)
        cosines = (unit @ unit.T).cpu().numpy()
        weights = np.where(cosines > TAU, 1.0, EPS)
        degree = np.diag(weights.sum(1))
        _, vectors = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[1, 2])
        vector = vectors[:, 0]
        above = vector > vector.mean()
        return float((above if above[np.abs(vector).argmax()] else ~above).mean())

    return work


def masks_ours(side: int, dim: int) -> Callable[[], float]:
    rows = inputs(1, side, dim)

    def work() -> float:
        found = maskcut.mask_cut(rows, (side, side), tau=TAU, eps=EPS, on_reject="released")
        return float(found.masks.double().mean())

    return work


def masks_plain(side: int, dim: int) -> Callable[[], float]:
    rows = inputs(1, side, dim)

    def work() -> float:
        kept = torch.zeros(0, side, side, dtype=torch.bool)
        painting, before = np.zeros(side * side, bool), torch.zeros(side, side, dtype=torch.bool)
        for number in range(3):
            unit = F.normalize(rows[0].cpu().double() * ~torch.from_numpy(painting)[:, None], dim=1)
            weights = np.where((unit @ unit.T).numpy() > TAU, 1.0, EPS)
            degree = np.diag(weights.sum(1))
            _, vectors = scipy.linalg.eigh(degree - weights, degree, subset_by_index=[1, 2])
            mask = maskcut.halves(torch.from_numpy(vectors[:, 0]).view(1, side, side)).components[0]
            shared = float((mask & before).sum() / (mask | before).sum())
            mask = mask if not number or (shared <= 0.5 and mask.double().mean() > 0.01) else torch.zeros_like(mask)
            kept = torch.cat([kept, (mask & ~kept.any(0))[None]])
            before, painting = mask, painting | mask.flatten().numpy()
        return float(kept.double().mean())

    return work


def segments_ours(pictures: int, side: int, dim: int, k: int) -> Callable[[], float]:
    affinity = spectral.feature_affinity(inputs(pictures, side, dim))

    def work() -> float:
        found = eigen.smallest(affinity, k)
        assert float(found.residuals.max()) <= 1e-5
        return float(found.values.double().sum())

    return work


def segments_plain(pictures: int, side: int, dim: int, k: int) -> Callable[[], float]:
    affinity = spectral.feature_affinity(inputs(pictures, side, dim)).cpu().numpy()
    start = np.random.default_rng(0).random(side * side)

    def work() -> float:
        total = 0.0
        for weights in affinity:
            degree = np.diag(weights.sum(1, dtype=np.float64))  # so the release solves in float64
            values, vectors = scipy.sparse.linalg.eigsh(degree - weights, k=k, sigma=0, which="LM", M=degree, v0=start)
            for number in range(k):
                if 0.5 < (vectors[:, number] > 0).mean() < 1:
                    vectors[:, number] *= -1
            total += float(values.sum())
        return total

    return work


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the sizes that are asked for or at tiny ones."""
    module = "benchmarks.spectral"
    cut = {"side": 60, "dim": 384}
    batch, single = {"pictures": 8, "side": 28, "dim": 384, "k": 15}, {"pictures": 1, "side": 60, "dim": 384, "k": 15}
    if quick:
        cut, batch = {"side": 15, "dim": 48}, batch | {"pictures": 2, "side": 15, "dim": 48, "k": 5}
        single = single | {"side": 16, "dim": 48, "k": 5}
    chosen = [
        Piece(f"token cut, {cut['side']} x {cut['side']}", module, "cut_plain", "cut_ours", cut, 15.0),
        Piece(f"mask cut, 3 masks, {cut['side']} x {cut['side']}", module, "masks_plain", "masks_ours", cut, 20.0),
        *(
            Piece(
                f"segments, {shape['pictures']} x {shape['side']} x {shape['side']}, {shape['k']} vectors", module,
                "segments_plain", "segments_ours", shape, 4.0,
            )
            for shape in (batch, single)
        ),
    ]  # fmt: skip
    return [replace(piece, faster=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("spectral", __doc__, pieces, "token cut, mask cut, segments", words)


if __name__ == "__main__":
    sys.exit(main())
