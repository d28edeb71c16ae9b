"""Times two formulations of one piece side by side: each in a process of its own, same threads, same allocator.

A piece names two set-up functions of a module. A set-up makes the inputs and returns the work: a function without
arguments whose result (a float, NaN where there is none) lets the table say how far the two sides agree. Seconds are
the median after one warm-up; memory is the highest resident memory while the work ran, warm-up included, minus what was
resident before (on a GPU: of torch's allocator). Sides run one after the other.

Allocators: `default`, or `tuned` with high mmap and trim thresholds, under which freed blocks are reused. Memory is not
comparable under `tuned`.
"""

import argparse
import importlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
ALLOCATORS = {
    "default": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 35), "MALLOC_TRIM_THRESHOLD_": str(1 << 35)},
}
_MARK = "measured "


@dataclass(frozen=True)
class Piece:
    """Two sides of one comparison and what is asked of it. `plain` and `ours` name set-up functions of `module`."""

    name: str
    module: str
    plain: str
    ours: str
    settings: dict[str, Any] = field(default_factory=dict)
    faster: float | None = None
    """How many times faster than plain is asked for; None where nothing is asked."""
    smaller: float | None = None
    """The same of memory."""
    note: str = ""


@dataclass(frozen=True)
class Side:
    """What was measured in one process. `seconds` is already multiplied by the work's share, see `extrapolated`."""

    seconds: float
    mib: float
    answer: float


@dataclass(frozen=True)
class Row:
    """A finished comparison."""

    piece: Piece
    plain: Side
    ours: Side

    @property
    def faster(self) -> float:
        return self.plain.seconds / self.ours.seconds

    @property
    def smaller(self) -> float:
        """Memory below one MiB counts as one: smaller growths are the size of a page cache's whim."""
        return max(self.plain.mib, 1.0) / max(self.ours.mib, 1.0)

    @property
    def met(self) -> bool:
        return self.faster >= (self.piece.faster or 0.0) and self.smaller >= (self.piece.smaller or 0.0)

    @property
    def asked(self) -> str:
        """The targets in words, and whether they are met."""
        targets = (("time", self.piece.faster), ("memory", self.piece.smaller))
        words = ", ".join(f"{target:.3g} x {what}" for what, target in targets if target)
        return f"{words}: {'met' if self.met else 'MISSED'}" if words else "-"

    @property
    def difference(self) -> str:
        """How far the answers of the two sides lie apart, relative to plain's."""
        value = abs(self.plain.answer - self.ours.answer) / max(abs(self.plain.answer), 1e-12)
        return "-" if math.isnan(value) else f"{value:.1e}"


def extrapolated(work: Callable[[], float], factor: float) -> Callable[[], float]:
    """Work that stands for `factor` times as much: its seconds are multiplied, its memory is not."""
    work.factor = factor
    return work


def compare(piece: Piece, threads: int, repeats: int, allocator: str = "default") -> Row:
    """Measure both sides of a piece, plain first."""
    sides = [_in_child(piece, function, threads, repeats, allocator) for function in (piece.plain, piece.ours)]
    return Row(piece, *sides)


def table(rows: list[Row]) -> str:
    """The comparisons as a markdown table."""
    lines = [
        "| piece | plain s, MiB | ours s, MiB | times faster | times smaller | asked | difference |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = (
            row.piece.name + (f" ({row.piece.note})" if row.piece.note else ""),
            f"{row.plain.seconds:.4g}, {row.plain.mib:.0f}",
            f"{row.ours.seconds:.4g}, {row.ours.mib:.0f}",
            f"{row.faster:.4g}",
            f"{row.smaller:.3g}",
            row.asked,
            row.difference,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(threads: int) -> str:
    """The machine in words, without its name."""
    processor = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{processor}, {os.cpu_count()} cores, {threads} threads used{gpu}; torch {torch.__version__}"


def _in_child(piece: Piece, function: str, threads: int, repeats: int, allocator: str) -> Side:
    words = [piece.module, function, json.dumps(piece.settings), str(repeats)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "benchmarks.harness", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | ALLOCATORS[allocator], capture_output=True, text=True, check=False
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(_MARK)]
    if done.returncode or not found:
        raise RuntimeError(f"{piece.name}: {function} ended with code {done.returncode}\n{done.stderr.strip()[-2000:]}")
    return Side(**json.loads(found[-1].removeprefix(_MARK)))


def _measure(module: str, function: str, settings: dict[str, Any], repeats: int) -> Side:
    work = getattr(importlib.import_module(module), function)(**settings)
    before = start_memory()
    answer = work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        answer = work()
        _wait()
        seconds.append(time.perf_counter() - start)
    mib = (peak_memory() - before) / 2**20
    return Side(statistics.median(seconds) * getattr(work, "factor", 1.0), mib, float(answer))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _status(key: str) -> int:
    """A size of /proc/self/status in bytes; 0 where there is no such file."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def start_memory(gpu: bool | None = None) -> int:
    """What is in use now, in bytes; the record of the peak starts anew. `gpu`: of a GPU; None: where there is one."""
    if torch.cuda.is_available() if gpu is None else gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the set-up
    except OSError:
        return max(_status("VmRSS"), peak_memory(False))
    return _status("VmRSS")


def peak_memory(gpu: bool | None = None) -> int:
    """The most that was in use since `start_memory`, in bytes."""
    if torch.cuda.is_available() if gpu is None else gpu:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def run(name: str, description: str, pieces: Callable[[bool], list[Piece]], known: str, words: list[str] | None) -> int:
    """The whole program `python -m benchmarks.<name>`: measure `pieces(quick)` and print the table."""
    parser = arguments(name, description)
    args = parser.parse_args(words)
    return measure(parser, args, pieces(args.quick), known)


def arguments(name: str, description: str) -> argparse.ArgumentParser:
    """The options that every benchmark takes; `name` is its module."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--allocator", choices=sorted(ALLOCATORS), default="default")
    parser.add_argument("--only", default="", metavar="WORD", help="pieces whose name holds this word")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    return parser


def measure(parser: argparse.ArgumentParser, args: argparse.Namespace, pieces: list[Piece], known: str) -> int:
    """Measure the chosen pieces and print their table; 0 also where a target is missed. `known`: words for --only."""
    chosen = [piece for piece in pieces if args.only in piece.name]
    if not chosen:
        parser.error(f"--only {args.only}: no piece has this word; there are {known}")
    print(
        f"{machine(args.threads)}; allocator {args.allocator}; median of {args.repeats} after a warm-up\n", flush=True
    )
    print(table([compare(piece, args.threads, args.repeats, args.allocator) for piece in chosen]))
    return 0


if __name__ == "__main__":
    measured = _measure(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
    print(_MARK + json.dumps(vars(measured)))
