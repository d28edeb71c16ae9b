"""`run.py doctor`: one line for each thing that a run needs: ok, or what to do. What needs torch comes last."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import config
from common import machine

FREE_GB = 5
"""Less free disk than this is worth a word."""


def examine(words: list[str]) -> bool:
    """Print the lines as they are found; True if nothing needs mending. `run.dir=…` may name where runs go."""
    cfg = config.compose(words)
    healthy = True
    for name, good, text in findings(Path(cfg.run.dir)):
        print(f"{name:<12} {'ok' if good else 'ATTENTION'}  {text}", flush=True)
        healthy &= good
    return healthy


def findings(runs: Path) -> Iterator[tuple[str, bool, str]]:
    """(what, is it well, facts or what to do)."""
    found = machine.versions()
    missing = [
        name
        for name in ("torch", "lightning", "timm", "torchmetrics", "kornia", "omegaconf", "wandb")
        if name not in found
    ]
    text = "  ".join(f"{name} {version}" for name, version in found.items())
    yield "packages", not missing, f"missing: {', '.join(missing)}; run `make setup`" if missing else text
    parent = next(folder for folder in (runs.resolve(), *runs.resolve().parents) if folder.exists())
    free = shutil.disk_usage(parent).free / 1e9
    yield (
        "disk",
        free > FREE_GB,
        f"{free:.0f} GB free at {runs}" + ("" if free > FREE_GB else "; make room or set run.dir"),
    )
    try:
        with tempfile.TemporaryFile(dir=parent):
            yield "run folder", True, f"{runs} is writable"
    except OSError as error:
        yield "run folder", False, f"{runs} cannot be written ({error.strerror}); set run.dir=<folder>"
    known = machine.has_wandb_key()
    key = "a key is known" if known else "no key: logger=wandb logs offline (upload later with `wandb sync`)"
    yield "wandb", True, key
    yield from torch_lines()
    yield from faiss_lines()


def torch_lines() -> Iterator[tuple[str, bool, str]]:
    """Cores and GPUs, as torch sees them."""
    import torch

    cores, threads = machine.cores(), torch.get_num_threads()
    yield "cpu", True, f"{cores} cores, torch uses {threads} threads (trainer.threads changes it)"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        yield "cuda", True, f"{torch.version.cuda}: {names}"
    elif shutil.which("nvidia-smi"):
        yield (
            "cuda",
            False,
            f"a driver is here but torch {torch.__version__} sees no GPU: is it older than CUDA {torch.version.cuda}?",
        )
    else:
        yield "cuda", True, "no GPU; runs use the CPU"


def faiss_lines() -> Iterator[tuple[str, bool, str]]:
    """The search engines, tried in a child process: a clash of libraries must not take this program down."""
    try:
        child = subprocess.run(
            [sys.executable, "-m", "retrieval.selftest"], capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired:
        yield "search", False, "the self-test hangs; set search.backend=torch"
        return
    for line in child.stdout.splitlines():
        engine, _, state = line.partition(": ")
        yield "search", state == "ok", engine if state == "ok" else f"{line}; search.backend=torch works without faiss"
    if child.returncode not in (0, 1):
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        yield "search", False, f"the self-test ended with code {child.returncode} ({last}); set search.backend=torch"
