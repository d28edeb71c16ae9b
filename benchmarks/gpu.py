"""One run that says how every method does on a GPU: `make bench-gpu`, at most eight minutes, from a checkout.

`python -m benchmarks.gpu [--device cuda|cpu] [--scale full|tiny] [--seconds S] [--only WORD] [--no-tests]`

First the tests that need a GPU. Then a training step of every method at its published batch, pictures of 224 px, random
weights, ViT-S/8 or the network of its recipe, with batches that lie on the device: so nothing of it is reading. Each
with float32 products, with TF32 allowed, with the backbone in bfloat16, and what else a method offers (`MORE`). A batch
that is too large is halved. `waits` are the places of a step where the host waits for the device. Last the sorting of
pixels alone. What no time is left for is named. The page is benchmarks/GPU.md; of other runs than `cuda full`
build/GPU.md. `--device cpu --scale tiny` runs all of it in a few minutes on two cores.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import config
from benchmarks import stepping, steps
from benchmarks.harness import ROOT, machine
from benchmarks.stepping import WARM, Cost, MadeData, Setting, Timer
from grouping.segments import sort_pixels
from lightning_modules import registry

SIZE, PICTURES = 224, 16
"""Pixels of a picture's side, and how many different ones there are: a batch is made of them."""
COUNTED = 5
"""Steps that count."""
SIZES = ("data.train_size", "data.eval_size", "method.stage.size", "method.crop.size")
"""Keys that are the size of a picture, where a method has them."""
ONE_GPU = {"method.crops.local_count": 16}
"""Pictures of a step on one GPU where the published batch is that of many: methods with this key."""
PRODUCTS = {
    "float32": {"trainer.matmul": "highest"},
    "TF32": {"trainer.matmul": "high"},
    "bf16 backbone": {"backbone.precision": "bf16"},
}
"""Each row of a method by what its products are; of a trained backbone the last is `trainer.precision=bf16-mixed`."""
MORE = {"method.contrast": ("dense", "sparse")}
"""Values of keys that are measured against each other, where a method has them."""


@dataclass(frozen=True)
class Row:
    """A line of the table: one method with one kind of products."""

    method: str
    products: str
    setting: Setting
    cost: Cost | None = None
    batch: int = 0
    waits: int | None = None
    error: str = ""


@dataclass
class Bench:
    """What is asked for, and the clock that it stops by."""

    device: str
    scale: str
    seconds: float
    began: float = field(default_factory=time.monotonic)
    longest: float = 0.0
    """Seconds of the longest piece so far: none is begun that could end too late."""

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    @property
    def tiny(self) -> bool:
        return self.scale == "tiny"

    @contextmanager
    def piece(self) -> Iterator[None]:
        first = time.monotonic()
        try:
            yield
        finally:
            self.longest = max(self.longest, time.monotonic() - first)

    def has_time(self) -> bool:
        return self.left > self.longest


# ---------------------------------------------------------------- batches on the device


class Batches:
    """One batch, again and again."""

    def __init__(self, batch: dict[str, Any], dataset: Any) -> None:
        self.batch, self.dataset = batch, dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (dict(self.batch) for _ in range(len(self)))

    def __len__(self) -> int:
        return 1000


class OnDevice(MadeData):
    """Made pictures whose training batches lie on the device: a few pictures, repeated to the batch, each time with
    other noise."""

    @property
    def local_batch(self) -> int:
        return min(int(self.data.batch_size), self.train_items)

    @property
    def steps_per_epoch(self) -> int:
        return 1000

    def train_dataloader(self) -> Batches:
        loader = super().train_dataloader()
        batch = next(iter(loader))
        return Batches(repeated(batch, int(self.data.batch_size), self.trainer.strategy.root_device), loader.dataset)


def repeated(batch: dict[str, Any], count: int, device: torch.device) -> dict[str, Any]:
    """A batch of `count` pictures on the device, of those of a smaller one; pictures get noise of their own."""
    draw = torch.Generator(device).manual_seed(0)
    own = len(batch["image"])
    rows = torch.arange(count, device=device) % own
    found: dict[str, Any] = {}
    for name, value in batch.items():
        if isinstance(value, Tensor):
            found[name] = value.to(device)[rows]
            if value.is_floating_point() and value.dim() == 4:
                noise = torch.rand(found[name].shape, generator=draw, device=device)
                found[name] = (0.9 * found[name] + 0.1 * noise).clamp_(0, 1)
        else:
            found[name] = [value[number % own] for number in range(count)] if len(value) == own else value
    return found


# ---------------------------------------------------------------- what is measured


def setting_of(method: str, bench: Bench) -> Setting:
    """A method at its published batch and at 224 px; `tiny`: its small default at 64 px."""
    if bench.tiny:
        setting = steps.default(method, 1, quick=True)
        kept = [word for word in setting.words if not word.startswith("trainer")]
        return replace(setting, words=(*kept, f"trainer={preset(bench)}"), made=(8, (64, 64)))
    recipe = stepping.recipe(method)
    words = [f"experiment={recipe}"] if recipe else [f"method={method}", "backbone=dino_vits8"]
    words += ["phases=[]", "backbone.weights=none", "backbone.precision=float32", f"trainer={preset(bench)}"]
    words += ["trainer.precision=32-true", *stepping.known_words(words, dict.fromkeys(SIZES, SIZE))]
    words += stepping.known_words(words, steps.CUT)
    words += [f"data.batch_size={ONE_GPU[key]}" for key in ONE_GPU if stepping.known_words(words, {key: 0})]
    return Setting(method, recipe or "default, dino_vits8", tuple(words), made=(PICTURES, (SIZE, SIZE)))


def preset(bench: Bench) -> str:
    return "gpu" if bench.device == "cuda" else "cpu"


def rows_of(method: str, bench: Bench) -> list[Row]:
    """The lines of a method that are to be measured."""
    plain = setting_of(method, bench)
    frozen = config.compose(plain.words).backbone.frozen
    found = []
    for name, values in PRODUCTS.items():
        if name == "bf16 backbone" and not frozen:
            name, values = "bf16-mixed", {"trainer.precision": "bf16-mixed"}
        found.append(Row(method, name, with_words(plain, values)))
    for key, choices in MORE.items():
        if stepping.known_words(list(plain.words), {key: choices[0]}):
            found += [
                Row(method, f"float32, {key.split('.')[-1]} {choice}", with_words(plain, {key: choice}))
                for choice in choices
            ]
    return found


def with_words(setting: Setting, values: dict[str, Any]) -> Setting:
    return replace(setting, words=(*setting.words, *(f"{key}={value}" for key, value in values.items())))


class Waits:
    """Counts, in one step behind those that count, where the host waits for the GPU."""

    def __init__(self, device: str) -> None:
        self.device, self.count = device, None

    @contextmanager
    def counted(self) -> Iterator[None]:
        if self.device != "cuda":
            yield
            return
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                yield
            finally:
                torch.cuda.set_sync_debug_mode("default")
        self.count = sum("synchroniz" in str(item.message) for item in said)


def measured(row: Row, bench: Bench) -> Row:
    """The row with its cost; an error is kept, and a batch that does not fit is halved."""
    batch = int(config.compose(row.setting.words).data.batch_size)
    while True:
        waits = Waits(bench.device)
        try:
            with tempfile.TemporaryDirectory() as folder:
                setting = with_words(row.setting, {"data.batch_size": batch})
                cost = stepping.costs(setting, Path(folder), 1 if bench.tiny else COUNTED, OnDevice, waits.counted)[-1]
            return replace(row, cost=cost, batch=batch, waits=waits.count)
        except torch.OutOfMemoryError:
            if batch == 1:
                return replace(row, error="not even one picture fits into the memory")
            batch //= 2
        except Exception as error:  # of one row: the others still run
            return replace(row, error=f"{type(error).__name__}: {(str(error).splitlines() or ['-'])[0][:160]}")
        finally:
            if bench.device == "cuda":
                torch.cuda.empty_cache()


def sorting(bench: Bench) -> list[str]:
    """Milliseconds and waits of SegSort's sorting alone, forward and backward."""
    lines = []
    for side in (8,) if bench.tiny else (28, 56):
        maps = torch.rand(8, 16 if bench.tiny else 128, side, side, device=bench.device, requires_grad=True)
        settings = {"cells": (5, 5), "iterations": 10}

        def work(maps: Tensor = maps, settings: dict[str, Any] = settings) -> None:
            sort_pixels(maps, **settings).unit.square().sum().backward()

        lines.append(f"| sorting, 8 x {side} x {side} | {timed(work, bench):.2f} ms | {waits_of(work, bench)} waits |")
    return lines


def timed(work: Callable[[], None], bench: Bench) -> float:
    """Milliseconds, the median of five after a first one."""
    timer, found = Timer(bench.device), []
    for _ in range(1 + COUNTED):
        with timer.span("work"):
            work()
        found.append(timer.take()["work"])
    return 1000 * statistics.median(found[1:])


def waits_of(work: Callable[[], None], bench: Bench) -> str:
    waits = Waits(bench.device)
    with waits.counted():
        work()
    return "no GPU, so no" if waits.count is None else str(waits.count)


def run_tests(bench: Bench) -> str:
    """`make test-gpu`, in a process of its own, within half of the time."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=bench.left / 2)
    except subprocess.TimeoutExpired:
        return f"not finished in {bench.left:.0f} s"
    lines = done.stdout.strip().splitlines() or [f"ended with code {done.returncode}"]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return "\n".join([*(f"    {line}" for line in failed), lines[-1].strip("= ")])


# ---------------------------------------------------------------- the page

HEAD = ["method", "setting", "batch", "products", "pictures/s", "backbone", "losses differ by", "waits", "MiB"]


def cells(row: Row, plain: Row | None) -> list[str]:
    """A line of the table; `plain`: that of the method with float32 products, which losses are compared with."""
    if row.cost is None:
        return [row.method, row.setting.name, "-", row.products, f"failed: {row.error}", "-", "-", "-", "-"]
    cost, differ = row.cost, "-"
    if plain is not None and plain.cost is not None and plain is not row and plain.batch == row.batch and cost.losses:
        pairs = zip(cost.losses, plain.cost.losses, strict=True)
        differ = f"{max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs):.1e}"
    count = row.batch if cost.unit.startswith("step") else 1
    return [
        row.method,
        row.setting.name + ("" if cost.unit.startswith("step") else " (stage)"),
        str(row.batch),
        row.products,
        f"{count / cost.seconds:.4g}",
        f"{cost.backbone / cost.seconds:.0%}",
        differ,
        "-" if row.waits is None else str(row.waits),
        f"{cost.mib:.0f}",
    ]


def page(bench: Bench, tests: str, table: list[str], sorted_lines: list[str], left_out: list[str]) -> str:
    """The whole page."""
    size = "64 px, the small defaults" if bench.tiny else f"{SIZE} px, published settings"
    parts = [
        "# Measured on a GPU" if bench.device == "cuda" else "# What `make bench-gpu` measures, tried on a CPU",
        f"`make bench-gpu DEVICE={bench.device} SCALE={bench.scale}` on {machine(torch.get_num_threads())}.\n"
        f"Training steps on pictures of {size}, random weights, batches that lie on\n"
        f"the device: the median of {1 if bench.tiny else COUNTED} behind {WARM}. Backbone: the share of its passes. "
        "Losses differ by: the largest difference\nto float32 products in the same steps, relative. Waits: places of a "
        "step where the host waits for the device. MiB: at\nthe peak.",
        f"Tests that need a GPU (`make test-gpu`): {tests}",
        "\n".join(table),
        "\n".join(["| piece | time | host |", "| --- | --- | --- |", *sorted_lines]) if sorted_lines else "",
        f"Not measured, because the {bench.seconds:.0f} s were over: {', '.join(left_out)}." if left_out else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(words: list[str] | None = None) -> int:
    """Measure, print, and write the page; 1 where a row failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=("full", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=480, help="what is left by then is named and left out")
    parser.add_argument("--only", default="", metavar="WORD", help="methods whose name holds this word")
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests that need a GPU")
    parser.add_argument("--output", type=Path, help="the page")
    args = parser.parse_args(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device is visible; DEVICE=cpu SCALE=tiny tries everything without one")
    methods = [name for name in registry.names() if args.only in name]
    if not methods:
        parser.error(f"--only {args.only}: no method has this word; there are {', '.join(registry.names())}")
    bench = Bench(args.device, args.scale, args.seconds)
    committed = (args.device, args.scale) == ("cuda", "full")
    output = args.output or ROOT / ("benchmarks" if committed else "build") / "GPU.md"
    print(f"{machine(torch.get_num_threads())}; at most {args.seconds:.0f} s\n", flush=True)
    tests = "left out" if args.no_tests else run_tests(bench)
    print(f"tests that need a GPU: {tests}\n", flush=True)
    steps.quiet()
    table, left_out, failed = [steps.line(HEAD), steps.line(["---"] * len(HEAD))], [], False
    print("\n".join(table), flush=True)
    for method in methods:
        plain = None
        for row in rows_of(method, bench):
            if not bench.has_time():
                left_out.append(f"{method} {row.products}")
                continue
            with bench.piece():
                found = measured(row, bench)
            plain = found if row.products == "float32" else plain
            failed = failed or found.cost is None
            table.append(steps.line(cells(found, plain)))
            print(table[-1], flush=True)
    sorted_lines = sorting(bench)
    text = page(bench, tests, table, sorted_lines, left_out)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text)
    print("", *sorted_lines, *(["", "left out: " + ", ".join(left_out)] if left_out else []), f"\n{output}", sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
