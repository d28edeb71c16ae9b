"""How training scales: measured here, and counted for the published size with what GPUs should make of it.

`python -m benchmarks.scaling [--method M] [--batches 4,8,16] [--processes 1,2] [--steps 12] [--threads 1]`
`python -m benchmarks.scaling --count [--quick]`

The first trains for some steps (scenes, `tiny`) for every batch and number of processes: pictures per second, and the
highest memory of the first process, each training in processes of its own. The second prints the tables of
docs/scaling.md: a step of a method is run on the CPU with one and with two pictures under torch's FLOP counter; a batch
of B pictures takes a B + b B^2, and what is gathered grows with B. For the loss of Hidden Positives over positives and
candidates alone, b is replaced by its formula (`sparse_pairs`), because they are a matter of chance. Seconds on GPUs
follow from the counts by the formula in `estimate`: they are estimates, and none was measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import config
from benchmarks.harness import ROOT, machine
from common import distributed
from common.spec import ClassMeta
from engine import setup
from lightning_modules import registry
from lightning_modules.base import UnsupervisedSegmenter

RECIPES = {"hidden_positives": "hidden_positives_cocostuff27_vits8", "stego": "stego_cocostuff27_vits8"}
BATCH, SIZE, CLASSES = 64, 224, 27
STEP = 1501
"""After the warm-up of lambda, and no step that refills a pool."""
POSITIVES = 64
"""Of both kinds together that a patch is assumed to have: on scenes and pictures of its own they are 15 to 80."""


@dataclass(frozen=True)
class GPU:
    """Peak numbers of the maker (dense, no sparsity), and the shares of them that are assumed to be reached."""

    name: str
    half: float
    """FLOP/s of bfloat16 and float16 matrix products."""
    single: float
    """FLOP/s of float32 outside of tensor cores."""
    link: float
    """Bytes/s to the other GPUs of a node, one direction."""
    memory: float
    """Bytes."""
    half_share: float = 0.4
    single_share: float = 0.6
    bandwidth: float = 4.8e12
    """Bytes/s of its own memory."""
    bandwidth_share: float = 0.7
    link_share: float = 0.7


H200 = GPU("H200 SXM", half=989e12, single=67e12, link=450e9, memory=141e9)


@dataclass(frozen=True)
class Counted:
    """One step of so many pictures, all ranks together."""

    pictures: int
    backbone: float
    """FLOP of the frozen backbone, all views."""
    rest: float
    """FLOP of everything else, backward pass included; float32 in the published settings."""
    images: float
    """Bytes of the pictures, all views, float32."""
    features: float
    """Bytes of their feature maps, float32."""
    gathered: dict[str, float]
    """Bytes of the gathered tensors by shape, as each rank holds them afterwards; gradients of gathered codes, which
    travel back, are entries of their own."""
    weights: float
    """Bytes of the gradients that DDP averages."""
    sieve: float = 0.0
    """FLOP of the bfloat16 products that positives are sieved by."""
    moved: float = 0.0
    """Bytes that the sparse loss reads and writes in memory."""


# ---------------------------------------------------------------- counting


def build(method: str, words: list[str]) -> tuple[UnsupervisedSegmenter, Any]:
    """A method in the middle of its training, with random weights and pools, and its configuration."""
    cfg = config.compose([*words, "backbone.weights=none", "data.root=none", f"method.num_clusters={CLASSES}"])
    kind = registry.method_class(method)
    later = type(kind.__name__, (kind,), {"global_step": property(lambda self: STEP)})
    meta = ClassMeta(tuple(map(str, range(CLASSES))), ((0, 0, 0),) * CLASSES)
    model = later(cfg, meta)
    model.total_steps = 2 * STEP
    if hasattr(model, "pool"):
        draw = torch.Generator().manual_seed(0)
        model.pool.fill_agnostic(torch.randn(model.pool_size, model.backbone.dim, generator=draw))
        model.pool.fill_specific(torch.randn(model.pool_size, cfg.method.dim, generator=draw))
    return model.train(), cfg


@contextmanager
def recorded(found: list[tuple[tuple[int, ...], int, bool]]) -> Iterator[None]:
    """Notes shape, bytes of an element and "with gradient" of all that is gathered over ranks."""
    plain = distributed.gather, distributed.gather_uneven

    def gather(tensor: Tensor, grad: bool = False) -> Tensor:
        found.append((tuple(tensor.shape), tensor.element_size(), grad))
        return plain[0](tensor, grad)

    def gather_uneven(tensor: Tensor) -> Tensor:
        found.append((tuple(tensor.shape), tensor.element_size(), False))
        return plain[1](tensor)

    distributed.gather, distributed.gather_uneven = gather, gather_uneven
    try:
        yield
    finally:
        distributed.gather, distributed.gather_uneven = plain


def counter() -> FlopCounterMode:
    """Torch's counter of matrix products and convolutions, which does not know the in-place `addmm_` of the losses."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: product})


def product(base: Any, one: torch.Size, two: torch.Size, **_: Any) -> int:
    """FLOP of base + one @ two, from their shapes."""
    return 2 * one[0] * one[1] * two[1]


def step(model: UnsupervisedSegmenter, pictures: int, size: int) -> Counted:
    """Run one training step (forward, probes, backward) on the CPU and count."""
    draw = torch.Generator().manual_seed(0)

    def images() -> Tensor:
        return torch.rand(pictures, 3, size, size, generator=draw)

    views = {"image": images(), **{name: images() for name in model.views}}
    if model.neighbours is not None:
        views["neighbour"] = images()
    label = torch.randint(0, CLASSES, (pictures, size, size), generator=draw)
    inside, shapes, gathers = [], [], []
    features = model.backbone.features

    def counted(*args: Any, **kwargs: Any) -> Any:
        with counter() as own:
            made = features(*args, **kwargs)
        inside.append(own.get_total_flops())
        shapes.append(sum(level.numel() * level.element_size() for level in made.levels))
        return made

    model.backbone.features = counted
    try:
        with counter() as outside, recorded(gathers):
            loss = model.loss(views, model.features(views["image"]))
            total = loss.total + model.cluster_probe.loss(loss.codes.detach())
            total = total + model.linear_probe.loss(loss.codes.detach(), label)
            total.backward()
    finally:
        del model.backbone.features
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    sent: dict[str, float] = {}
    for shape, width, grad in gathers:
        name = " x ".join(map(str, ("B" if shape[0] == pictures else f"{shape[0] // pictures} B", *shape[1:])))
        kind = "float32" if width == 4 else f"{8 * width} bit"
        for key in (f"{name} {kind}", *([f"{name} {kind}, gradient"] if grad else [])):
            sent[key] = sent.get(key, 0.0) + torch.Size(shape).numel() * width
    backbone = float(sum(inside))
    return Counted(
        pictures,
        backbone,
        outside.get_total_flops() - backbone,
        4.0 * sum(value.numel() for value in views.values()),
        float(sum(shapes)),
        sent,
        4.0 * sum(parameter.numel() for parameter in trained),
    )


def scaled(one: Counted, two: Counted, pictures: int) -> Counted:
    """A step of more pictures, from counts of one and of two."""
    pairs = (two.rest - 2 * one.rest) / 2
    return Counted(
        pictures,
        one.backbone * pictures,
        (one.rest - pairs) * pictures + pairs * pictures**2,
        one.images * pictures,
        one.features * pictures,
        {name: size * pictures for name, size in one.gathered.items()},
        one.weights,
    )


def sparse_pairs(total: int, cells: int, dim: int, channels: int, rho: float) -> dict[str, float]:
    """What the sparse loss of Hidden Positives takes for N patches: FLOP of the sieve and of the rest, bytes moved.

    Sieve: both kinds, a pair once, in bfloat16; a block is read or written eight times in all. Candidates: three
    products for z and for z_mix; a gathered float is read or written eight times. Positives: POSITIVES a patch, half as
    many pairs, three products each.
    """
    candidates = cells * rho * total * dim
    pairs = POSITIVES / 2 * total * dim
    return {
        "sieve": float(total**2 * (dim + channels)),
        "rest": 2 * 6 * (candidates * total / cells + pairs),
        "moved": 8 * 2 * float(total**2) + 2 * 4 * (8 * candidates + 4 * pairs),
    }


def sparse(counted: Counted, cells: int, dim: int, channels: int, rho: float) -> Counted:
    """A counted step of Hidden Positives with the sparse loss in place of all pairs of patches."""
    total = counted.pictures * cells
    instead = sparse_pairs(total, cells, dim, channels, rho)
    return replace(
        counted,
        rest=counted.rest - dense_pairs(total, dim, channels) + instead["rest"],
        sieve=instead["sieve"],
        moved=instead["moved"],
    )


def dense_pairs(total: int, dim: int, channels: int) -> float:
    """FLOP of all pairs of N patches: products and gradients of z and z_mix, and both kinds of positives."""
    return 12.0 * total**2 * dim + 2.0 * total**2 * (channels + dim)


def count(method: str, words: list[str], size: int, pictures: int) -> dict[str, Counted]:
    """The step of a recipe by name; Hidden Positives both ways."""
    pairs = method == "hidden_positives"
    model, cfg = build(method, [*words, "method.contrast=dense"] if pairs else words)
    found = scaled(step(model, 1, size), step(model, 2, size), pictures)
    if not pairs:
        return {method: found}
    cells = (size // model.backbone.strides[0]) ** 2
    few = sparse(found, cells, cfg.method.dim, model.backbone.dim, cfg.method.rho)
    return {method: few, "the same, all pairs": found}


# ---------------------------------------------------------------- estimating


def estimate(counted: Counted, gpu: GPU, processes: int) -> dict[str, float]:
    """Seconds of a step on so many GPUs: backbone, rest, link; they follow one another. An estimate, not measured.

    Each rank has 1/P of the pictures and of the anchors: FLOP / P at the assumed share of the peak of their precision.
    An all-gather brings a rank (P-1)/P of the gathered bytes, a ring of DDP's gradients twice that. Left out: kernels
    that are bound by memory, launches, augmentation, reading and decoding pictures.
    """
    travels = sum(counted.gathered.values()) + 2 * counted.weights
    return {
        "backbone": counted.backbone / processes / (gpu.half * gpu.half_share),
        "rest": (
            counted.rest / (gpu.single * gpu.single_share)
            + counted.sieve / (gpu.half * gpu.half_share)
            + counted.moved / (gpu.bandwidth * gpu.bandwidth_share)
        )
        / processes,
        "link": travels * (processes - 1) / processes / (gpu.link * gpu.link_share),
    }


def rows_that_fit(gpu: GPU, dim: int, width: int, share: float = 0.5) -> float:
    """Rows [dim] of so many bytes a number that fit into a share of the memory (the other half is for training)."""
    return gpu.memory * share / (dim * width)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def count_tables(found: dict[str, Counted], gpu: GPU) -> str:
    """What `--count` prints."""
    sizes = [
        [
            method, f"{item.backbone / 1e12:.2f}", f"{item.rest / 1e12:.3g}", f"{item.sieve / 1e12:.3g}",
            f"{item.moved / 1e9:.0f}", f"{item.images / 1e6:.0f}",
            f"{item.features / 1e6:.0f}", f"{sum(item.gathered.values()) / 1e6:.0f}", f"{item.weights / 1e6:.1f}",
        ]
        for method, item in found.items()
    ]  # fmt: skip
    counted = table(
        [
            "method",
            "backbone TFLOP",
            "rest TFLOP",
            "sieve TFLOP",
            "moved GB",
            "pictures MB",
            "features MB",
            "gathered MB",
            "gradients MB",
        ],
        sizes,
    )
    sent = table(
        ["method", "gathered tensor (B: global batch)", "MB"],
        [
            [method, name, f"{size / 1e6:.3g}"]
            for method, item in found.items()
            if "same" not in method
            for name, size in item.gathered.items()
        ],
    )
    guesses = []
    for method, item in found.items():
        for processes in (1, 8):
            parts = estimate(item, gpu, processes)
            seconds = sum(parts.values())
            spent = [f"{1000 * value:.3g}" for value in parts.values()]
            share = f"{parts['backbone'] / seconds:.0%}"
            guesses.append([method, str(processes), *spent, f"{item.pictures / seconds:,.0f}", share])
    head = ["method", f"{gpu.name}s", "backbone ms", "rest ms", "link ms", "pictures/s", "backbone's share"]
    banks = [
        [what, f"{dim}", f"{8 * width}", f"{rows_that_fit(gpu, dim, width) / 1e6:.0f}"]
        for what, dim, width in (
            ("features of ViT-S", 384, 4), ("the same", 384, 2), ("features of ViT-B", 768, 4), ("the same", 768, 2),
            ("codes of HP", 512, 4), ("codes of STEGO", 70, 4),
        )
    ]  # fmt: skip
    fits = table(["rows of a bank", "numbers", "bits", f"million rows in half of {gpu.memory / 1e9:.0f} GB"], banks)
    return "\n\n".join((counted, sent, table(head, guesses), fits))


# ---------------------------------------------------------------- measuring


def measured(method: str, batch: int, processes: int, steps: int, threads: int) -> tuple[float, float]:
    """(pictures per second, highest MiB of the first process) of a short training in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [
            f"method={method}", "data=scenes", "backbone=tiny", "trainer=ddp", f"trainer.devices={processes}",
            "trainer.precision=32-true", f"data.batch_size={batch}", f"data.train_count={max(32, batch)}",
            "data.val_count=4", "data.workers=0", f"trainer.max_steps={steps}", "trainer.val_every=100000",
            "trainer.checkpoint_every=100000", "trainer.progress=none", "evaluation.panels=0", f"run.dir={folder}",
            "evaluation.kmeans.restarts=1", "evaluation.kmeans.pictures=8", "run.name=x", f"trainer.threads={threads}",
        ]  # fmt: skip
        if not torch.cuda.is_available():
            words.append("trainer.accelerator=cpu")
        done = subprocess.run(
            [sys.executable, "run.py", "train", *words],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"batch {batch}, {processes} processes: {done.stderr.strip()[-2000:]}")
        facts = json.loads((Path(folder) / "x" / "environment.json").read_text())
    peak = facts["peak_memory"]
    return facts["train_images_per_second"], peak.get("gpu_mib", peak["resident_mib"])


def measure(
    args: argparse.Namespace, run: Callable[[str, int, int, int, int], tuple[float, float]] = measured
) -> Iterator[str]:
    """The lines of the measured table."""
    kind = "GPU memory" if torch.cuda.is_available() else "resident memory"
    yield f"| batch | processes | pictures/s | {kind} of the first, MiB |"
    yield "| --- | --- | --- | --- |"
    for batch in args.batches:
        for processes in args.processes:
            if batch % processes == 0:
                speed, peak = run(args.method, batch, processes, args.steps, args.threads)
                yield f"| {batch} | {processes} | {speed:.1f} | {peak:.0f} |"


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main(words: list[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0])
    parser.add_argument("--count", action="store_true", help="count a step of the published size and estimate")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    parser.add_argument("--method", default="hidden_positives")
    parser.add_argument("--batches", type=numbers, default=[4, 8, 16])
    parser.add_argument("--processes", type=numbers, default=[1, 2])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(words)
    setup.begin()
    if args.count:
        tiny = ["backbone=tiny"] if args.quick else []
        size = 48 if args.quick else SIZE
        recipes = {name: [f"experiment={recipe}", *tiny] for name, recipe in RECIPES.items()}
        print(f"A step of {BATCH} pictures of {size} px, {CLASSES} classes.\n")
        counts = [count(name, given, size, BATCH) for name, given in recipes.items()]
        print(count_tables({name: item for found in counts for name, item in found.items()}, H200))
        return 0
    if args.quick:
        args.batches, args.processes, args.steps = [4], [1], 2
    print(f"{args.method}, {machine(args.threads)}; {args.steps} steps of scenes with tiny\n", flush=True)
    for line in measure(args):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
