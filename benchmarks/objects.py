"""The costly pieces of EAGLE and MaskContrast beside their plain formulation, in one run.

`python -m benchmarks.objects [--threads T] [--repeats R] [--allocator default|tuned] [--only WORD] [--quick]`

cue: eigenvectors 2 to 4 of two views of a batch of pictures; plain as released, with a full decomposition and the
Laplacian from dense inverses. The answer is the sum of their absolute values. medoids: of a batch in which one segment
has most patches, as with ids of all pictures; plain: the distances of an id's members at once. The answer is the sum of
the rows' numbers. correspondence: 28 x 28 sample points, forward and backward; plain: all pairs of a batch at once.
masks: object pixels of pictures of 224 px against prototypes, forward and backward to maps of 28 x 28; plain: the
enlarged maps of a batch, and all pixels times all prototypes, at once.
"""

import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.harness import Piece, run
from grouping import eicue
from losses import adaptive_shift, correspondence, object_contrast
from losses.objects import mask_contrast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def views(pictures: int, side: int, dim: int) -> tuple[list[Tensor], Tensor]:
    """Codes [B,D,h,w] of two views and colours [B,3,h,w], smooth and with noise."""
    draws = torch.Generator().manual_seed(0)

    def smooth(channels: int, noise: float) -> Tensor:
        coarse = torch.randn(pictures, channels, 6, 6, generator=draws)
        maps = F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
        return maps + noise * torch.randn(maps.shape, generator=draws)

    codes = smooth(dim, 0.7)
    other = codes + 0.1 * torch.randn(codes.shape, generator=draws)
    return [codes.to(DEVICE), other.to(DEVICE)], smooth(3, 0.1).sigmoid().to(DEVICE)


def cue_ours(**settings: int) -> Callable[[], float]:
    codes, coloured = views(**settings)
    return lambda: sum(float(maps.abs().sum()) for maps in eicue.vectors(codes, coloured, 4))


def cue_plain(**settings: int) -> Callable[[], float]:
    codes, coloured = views(**settings)

    def work() -> float:
        total = 0.0
        for rows in codes:
            for code, colour in zip(rows.flatten(2).mT, coloured.flatten(2).mT, strict=True):
                graph = (code @ code.T).clamp(min=0)
                near = (-(torch.cdist(colour, colour) ** 2) / (2 * eicue.SIGMA**2)).exp()
                graph = graph / graph.max() + near / near.max()
                degree = graph.sum(1).diag()
                inverse = torch.linalg.inv(degree**0.5)
                _, vectors = torch.linalg.eigh(inverse @ (degree - graph) @ torch.linalg.inv(degree**0.5), UPLO="U")
                total += float(vectors[:, 1:4].abs().sum())
        return total

    return work


def members(patches: int, dim: int) -> tuple[Tensor, Tensor]:
    """Unit rows [1,R,D] and ids [1,R]: one id has seven of ten rows."""
    draws = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.randn(1, patches, dim, generator=draws) + 0.2, dim=2)
    ids = torch.randint(10, (1, patches), generator=draws)
    return rows.to(DEVICE), torch.where(ids > 3, 0, ids).to(DEVICE)


def medoids_ours(patches: int, dim: int) -> Callable[[], float]:
    rows, ids = members(patches, dim)
    return lambda: float(object_contrast.medoids(rows, ids, 4).sum())


def medoids_plain(patches: int, dim: int) -> Callable[[], float]:
    rows, ids = members(patches, dim)

    def work() -> float:
        total = 0
        for name in range(4):
            own = (ids[0] == name).nonzero()[:, 0]
            total += int(own[torch.cdist(rows[0, own], rows[0, own]).sum(1).argmin()])
        return float(total)

    return work


def pairs(pictures: int, side: int, dim: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Sampled features and codes of a batch and its negatives."""
    draws = torch.Generator().manual_seed(0)
    maps = [torch.randn(pictures, dim, side, side, generator=draws) + 0.3 for _ in range(4)]
    return tuple(part.to(DEVICE) for part in maps[:2]), tuple(part.to(DEVICE) for part in maps[2:])


def _step(codes: tuple[Tensor, ...], loss: Callable[[tuple[Tensor, ...]], Tensor]) -> float:
    leaves = tuple(code.detach().requires_grad_() for code in codes)
    total = loss(leaves)
    total.backward()
    return total.item() + sum(float(torch.linalg.vector_norm(leaf.grad)) for leaf in leaves)


def correspondence_ours(**settings: int) -> Callable[[], float]:
    features, codes = pairs(**settings)
    rule = adaptive_shift.ShiftRule()
    return lambda: _step(
        codes, lambda own: adaptive_shift.adaptive_correspondence(features, own, rule, positive=False).loss
    )


def correspondence_plain(**settings: int) -> Callable[[], float]:
    features, codes = pairs(**settings)
    rule = adaptive_shift.ShiftRule()

    def loss(own: tuple[Tensor, Tensor]) -> Tensor:
        wanted, found = correspondence.signal(*features), correspondence.cosines(*own)
        shift = rule.shift(wanted.mean(), found.mean(), positive=False)
        return (-found.clamp(0, correspondence.CEILING) * (wanted - shift)).mean()

    return lambda: _step(codes, loss)


def masked(pictures: int, side: int, dim: int, queue: int) -> dict[str, Tensor]:
    """Maps [B,D,side,side], masks bool eight times as large, prototypes with those of a queue, and their weights."""
    draws = torch.Generator().manual_seed(0)
    masks = torch.rand(pictures, 8 * side, 8 * side, generator=draws) < 0.35
    bank = F.normalize(torch.randn(pictures + queue, dim, generator=draws), dim=1)
    given = {"maps": torch.randn(pictures, dim, side, side, generator=draws), "masks": masks, "prototypes": bank}
    given["weights"] = mask_contrast.class_weights(F.pad(masks.sum((1, 2)), (0, queue)))
    return {name: value.to(DEVICE) for name, value in given.items()}


def masks_ours(**settings: int) -> Callable[[], float]:
    given = masked(**settings)
    own = torch.arange(settings["pictures"], device=DEVICE)
    return lambda: _step(
        (given["maps"],),
        lambda leaf: mask_contrast.object_contrast(**(given | {"maps": leaf[0]}), temperature=0.5, own=own),
    )


def masks_plain(**settings: int) -> Callable[[], float]:
    given = masked(**settings)
    own = torch.arange(settings["pictures"], device=DEVICE).repeat_interleave(given["masks"].sum((1, 2)))

    def loss(leaf: tuple[Tensor]) -> Tensor:
        large = F.interpolate(leaf[0], size=given["masks"].shape[1:], mode="bilinear", align_corners=False)
        rows = F.normalize(large, dim=1).permute(0, 2, 3, 1)[given["masks"]]
        return F.cross_entropy(rows @ given["prototypes"].T / 0.5, own, given["weights"])

    return lambda: _step((given["maps"],), loss)


def pieces(quick: bool) -> list[Piece]:
    """What is compared, at the sizes that are asked for or at tiny ones."""
    module = "benchmarks.objects"
    cue = {"pictures": 4, "side": 28, "dim": 512}
    rows, sampled = {"patches": 12_544, "dim": 128}, {"pictures": 64, "side": 28, "dim": 64}
    contrast = {"pictures": 16, "side": 28, "dim": 32, "queue": 256}
    if quick:
        contrast = {"pictures": 2, "side": 4, "dim": 8, "queue": 6}
        cue, rows = {"pictures": 2, "side": 15, "dim": 16}, {"patches": 1200, "dim": 16}
        sampled = {"pictures": 2, "side": 6, "dim": 8}
    chosen = [
        Piece(f"cue, {cue['pictures']} x {cue['side']} x {cue['side']}", module, "cue_plain", "cue_ours", cue, 4.0),
        Piece(f"medoids, {rows['patches']} patches", module, "medoids_plain", "medoids_ours", rows, None, 3.0),
        Piece(
            f"correspondence, {sampled['pictures']} x {sampled['side']} x {sampled['side']}", module,
            "correspondence_plain", "correspondence_ours", sampled, None, 2.0,
        ),
        Piece(
            f"masks, {contrast['pictures']} pictures, {contrast['pictures'] + contrast['queue']} prototypes", module,
            "masks_plain", "masks_ours", contrast, 1.0, 5.0,
        ),
    ]  # fmt: skip
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    return run("objects", __doc__, pieces, "cue, medoids, correspondence, masks", words)


if __name__ == "__main__":
    sys.exit(main())
