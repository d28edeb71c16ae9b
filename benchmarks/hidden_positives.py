"""The pieces of Hidden Positives beside the plain formulation of the release, in float32, in one run.

`python -m benchmarks.hidden_positives [--patches N] [--threads T] [--repeats R] [--allocator default|tuned]
[--only WORD] [--quick] [--ways]`

contrastive: thresholds, candidates, loss and backward. mixing: codes with their 3x3 neighbours, forward and backward.
refill: a whole pool of M entries; the plain side is extrapolated from 16 pictures. With --ways: CPU seconds of the
contrastive loss alone, in turns in one process, as all pairs and as positives and candidates alone, in float32 and with
the bfloat16 sieve, and the plain formulation once; memory each in a process of its own.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import ROOT, Piece, arguments, extrapolated, machine, measure
from losses import contrastive
from losses.contrastive import pairs
from losses.local_positives import attention_weights, neighbour_mix, neighbourhood, row_attention
from models.heads import SegmentationHead, patch_rows
from models.momentum import Momentum
from retrieval.memory import ReferencePool

TEMPERATURE, RHO, LAM, BASE = 0.8, 0.02, 0.5, 0.07
PICTURES_RUN = 16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def smooth_rows(pictures: int, side: int, width: int, generator: torch.Generator) -> Tensor:
    """Unit rows [pictures * side * side, width] of maps with some structure."""
    coarse = torch.randn(pictures, width, max(2, side // 4), max(2, side // 4), generator=generator)
    maps = F.interpolate(coarse, size=(side, side), mode="bilinear")
    maps = maps + 0.3 * torch.randn(maps.shape, generator=generator)
    return F.normalize(patch_rows(maps), dim=1).to(DEVICE)


def contrastive_inputs(patches: int, side: int, dim: int, channels: int, pool: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pictures = patches // (side * side)
    rows = {
        name: smooth_rows(pictures, side, width, generator)
        for name, width in (("z", dim), ("z_mix", dim), ("f", channels), ("s", dim))
    }
    for name, source in (("pool_ag", "f"), ("pool_sp", "s")):
        chosen = torch.randint(patches, (pool,), generator=generator).to(DEVICE)
        noise = 0.02 * torch.randn(pool, rows[source].shape[1], generator=generator).to(DEVICE)
        rows[name] = F.normalize(rows[source][chosen] + noise, dim=1)
    rows["z"].requires_grad_()
    rows["z_mix"].requires_grad_()
    return rows


def contrastive_ours(
    patches: int, side: int, dim: int, channels: int, pool: int, contrast: str = "auto"
) -> Callable[[], float]:
    rows = contrastive_inputs(patches, side, dim, channels, pool)

    def work() -> float:
        rows["z"].grad = rows["z_mix"].grad = None
        loss = contrastive.ghp_contrastive(
            rows["z"],
            rows["z_mix"],
            rows["f"],
            rows["s"],
            contrastive.thresholds(rows["f"], rows["pool_ag"]),
            contrastive.thresholds(rows["s"], rows["pool_sp"]),
            cells=side * side,
            temperature=TEMPERATURE,
            lam=LAM,
            candidates=contrastive.random_candidates(0, 0, side * side, patches, RHO, DEVICE),
            contrast=contrast,
        )
        loss.backward()
        return loss.item()

    return work


def contrastive_dense(**sizes: int) -> Callable[[], float]:
    return contrastive_ours(**sizes, contrast="dense")


def contrastive_sparse(**sizes: int) -> Callable[[], float]:
    return contrastive_ours(**sizes, contrast="sparse")


def contrastive_float32(**sizes: int) -> Callable[[], float]:
    """The sparse way without its bfloat16 sieve."""
    found = contrastive_sparse(**sizes)

    def work() -> float:
        with patch.object(pairs, "native_half", lambda device: False):
            return found()

    return work


def contrastive_plain(patches: int, side: int, dim: int, channels: int, pool: int) -> Callable[[], float]:
    rows = contrastive_inputs(patches, side, dim, channels, pool)
    cells = side * side

    def positives(codes: Tensor, threshold: Tensor, own: slice) -> Tensor:
        similarity = codes[own] @ codes.T
        return ((similarity > threshold[own, None]) | (similarity > threshold[None])).float()

    def half(codes: Tensor, own: slice, inside: Tensor, weights: Tensor, kept: Tensor) -> Tensor:
        logits = codes[own] @ codes.T / TEMPERATURE
        logits = logits - logits.max(1, keepdim=True).values.detach()
        denominator = (logits.exp() * inside).sum(1, keepdim=True)
        log_p = logits - torch.log(denominator)
        counts = weights.sum(1)[kept]
        mean = (weights * log_p).sum(1)[kept] / counts
        return (-(TEMPERATURE / BASE) * mean * counts / counts.mean()).mean()

    def work() -> float:
        rows["z"].grad = rows["z_mix"].grad = None
        with torch.no_grad():
            threshold_ag = (rows["f"] @ rows["pool_ag"].T).max(1).values
            threshold_sp = (rows["s"] @ rows["pool_sp"].T).max(1).values
            # The same draw as on our side, so that the losses can be compared.
            uniform = contrastive.random_candidates(0, 0, cells, patches, RHO, DEVICE).float()
        total = 0.0
        for number in range(patches // cells):
            own = slice(number * cells, (number + 1) * cells)
            with torch.no_grad():
                others = torch.ones(cells, patches, device=DEVICE)
                others[:, own].fill_diagonal_(0.0)
                ag = positives(rows["f"], threshold_ag, own) * others
                sp = positives(rows["s"], threshold_sp, own) * others
                inside = torch.maximum(ag, uniform) * others
                weights = ag + LAM * sp
                kept = ag.sum(1) > 0
            total = (
                total + half(rows["z"], own, inside, weights, kept) + half(rows["z_mix"], own, inside, weights, kept)
            )
        loss = total / (2 * (patches // cells))
        loss.backward()
        return loss.item()

    return work


def mixing_inputs(pictures: int, side: int, dim: int) -> tuple[Tensor, Tensor]:
    """Codes [B,D,h,w] that want gradient, and attention logits [B,heads,T,T]."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(pictures, dim, side, side, generator=generator).to(DEVICE).requires_grad_()
    tokens = 1 + side * side
    return codes, torch.randn(pictures, 2, tokens, tokens, generator=generator).to(DEVICE)


def mixing_ours(pictures: int, side: int, dim: int) -> Callable[[], float]:
    codes, logits = mixing_inputs(pictures, side, dim)
    weights = attention_weights(logits, 1, (side, side))
    del logits

    def work() -> float:
        codes.grad = None
        neighbour_mix(codes, weights).square().sum().backward()
        return codes.grad.square().sum().item()

    return work


def mixing_plain(pictures: int, side: int, dim: int) -> Callable[[], float]:
    codes, logits = mixing_inputs(pictures, side, dim)
    attention = torch.stack([row_attention(picture) for picture in logits[:, :, 1:, 1:].mean(1)])
    index, valid = neighbourhood(side, side, DEVICE)
    near = torch.zeros(side * side, side * side, device=DEVICE).scatter_add_(1, index, valid.float())
    count = valid.sum(1)[:, None]
    del logits

    def work() -> float:
        codes.grad = None
        mixed = []
        for code, weights in zip(codes, attention, strict=True):
            rows = code.flatten(1).T
            mixed.append(((weights * near)[:, :, None] * rows[None]).sum(1) / count)
        torch.stack(mixed).square().sum().backward()
        return codes.grad.square().sum().item()

    return work


def momentum_head(channels: int, dim: int) -> Momentum:
    torch.manual_seed(2)
    return Momentum(SegmentationHead(channels, dim)).to(DEVICE)


def refill_ours(pool: int, dim: int, backbone: str, size: int) -> Callable[[], float]:
    channels = build_backbone(backbone, size).dim
    generator = torch.Generator().manual_seed(3)
    head, bank = momentum_head(channels, dim), ReferencePool(pool, channels, dim).to(DEVICE)
    bank.kept.enqueue(torch.randn(pool, channels, generator=generator).to(DEVICE))

    def work() -> float:
        bank.refill(head)
        return math.nan  # other pictures than the plain side's: there is nothing to compare

    return work


def refill_plain(pool: int, dim: int, backbone: str, size: int) -> Callable[[], float]:
    network = build_backbone(backbone, size)
    generator = torch.Generator().manual_seed(3)
    head = momentum_head(network.dim, dim)
    images = torch.rand(PICTURES_RUN, 3, size, size, generator=generator).to(DEVICE)

    @torch.no_grad()
    def work() -> float:
        rows = []
        for batch in images.split(8):
            codes = head(network.features(batch).concat())
            chosen = torch.randint(codes[0, 0].numel(), (len(batch),), generator=generator).to(DEVICE)
            rows.append(F.normalize(codes.flatten(2)[torch.arange(len(batch), device=DEVICE), :, chosen], dim=1))
        torch.cat(rows)
        return math.nan

    return extrapolated(work, pool / PICTURES_RUN)


def build_backbone(name: str, size: int) -> torch.nn.Module:
    """The project's backbone with random weights: they take the same time."""
    from models.backbone import Backbone

    cfg = OmegaConf.load(ROOT / "configs" / "backbone" / f"{name}.yaml")
    cfg.weights = "none"
    return Backbone(cfg, seed=0).to(DEVICE).eval()


def pieces(patches: int, quick: bool) -> list[Piece]:
    """What is compared, at the published sizes or at tiny ones."""
    module = "benchmarks.hidden_positives"
    side = 8 if quick else 28
    loss = {"patches": patches, "side": side, "dim": 16 if quick else 512, "channels": 12 if quick else 384}
    loss["pool"] = 32 if quick else 2048
    mix = {"pictures": 2 if quick else 4, "side": side, "dim": 16 if quick else 512}
    refill = {"pool": 64 if quick else 2048, "dim": 16 if quick else 512}
    refill |= {"backbone": "tiny" if quick else "dino_vits8", "size": 64 if quick else 224}
    chosen = [
        Piece(
            f"contrastive loss, N = {patches}", module, "contrastive_plain", "contrastive_ours", loss, 1 / 0.65, 10.0
        ),
        Piece(f"mixing, {side} x {side}", module, "mixing_plain", "mixing_ours", mix, 100.0, 10.0),
        Piece(
            f"pool refill, M = {refill['pool']}",
            module,
            "refill_plain",
            "refill_ours",
            refill,
            1000.0,
            note=f"plain extrapolated from {PICTURES_RUN} pictures",
        ),
    ]
    return [replace(piece, faster=None, smaller=None) for piece in chosen] if quick else chosen


WAYS = {
    "plain": "contrastive_plain",
    "all pairs": "contrastive_dense",
    "sparse, float32": "contrastive_float32",
    "sparse, bfloat16 sieve": "contrastive_sparse",
}
"""Ways of the contrastive loss and their set-ups; where bfloat16 is not native the last two are the same."""


def ways(piece: Piece, threads: int, repeats: int) -> str:
    """The table of --ways: a warm-up of each but plain, then all of them in turns."""
    works = {name: globals()[made](**piece.settings) for name, made in WAYS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    answers = {}
    for turn in range(repeats + 1):
        for name, work in works.items():
            if name == "plain" and turn:
                continue
            start = time.process_time()
            answers[name] = work()
            if turn or name == "plain":
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    lines = ["| way | CPU s | MiB | times faster than all pairs | difference |", "|---|---|---|---|---|"]
    for name, made in WAYS.items():
        mib = harness._in_child(piece, made, threads, 1, "default").mib
        apart = abs(answers[name] / answers["all pairs"] - 1)
        faster = medians["all pairs"] / medians[name]
        lines.append(f"| {name} | {medians[name]:.4g} | {mib:.0f} | {faster:.3g} | {apart:.1e} |")
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = arguments("hidden_positives", __doc__)
    parser.add_argument("--patches", type=int, help="N of the contrastive loss, a multiple of 784 (64 with --quick)")
    parser.add_argument("--ways", action="store_true", help="CPU time of the ways of the contrastive loss, in turns")
    args = parser.parse_args(words)
    cells = 64 if args.quick else 784
    patches = args.patches or (2 * cells if args.quick else 16 * cells)
    if patches % cells:
        parser.error(f"--patches {patches}: must be a multiple of {cells}")
    if args.ways:
        torch.set_num_threads(args.threads)
        print(f"{machine(args.threads)}; N = {patches}; medians of {args.repeats} turns after a warm-up\n", flush=True)
        print(ways(pieces(patches, args.quick)[0], args.threads, args.repeats))
        return 0
    return measure(parser, args, pieces(patches, args.quick), "contrastive, mixing, refill")


if __name__ == "__main__":
    sys.exit(main())
