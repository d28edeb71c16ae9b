"""A training step of every method beside its floor, the backbone's passes in it; stages of methods by the picture.

`python -m benchmarks.steps [--only WORD] [--threads T] [--jobs J] [--steps N] [--quick] [--write]`

Every method at its small default (drawn scenes, `tiny`), and at the published setting that `stepping.recipe` names,
with random weights, made pictures and a smaller batch. Seconds are CPU time of one process, medians of some steps, so
rows may run beside each other (`--jobs`). `--write` puts the table into benchmarks/RESULTS.md.
"""

import argparse
import logging
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path

import config
from benchmarks import stepping
from benchmarks.harness import ROOT, machine
from benchmarks.stepping import Cost, Setting
from engine import setup
from lightning_modules import registry

RESULTS = ROOT / "benchmarks" / "RESULTS.md"
FIRST, LAST = "<!-- steps: made by python -m benchmarks.steps --write -->", "<!-- end of steps -->"

PICTURES = 64
"""Scenes of a default setting: enough for its tables and pools."""
BATCH, FILES = 4, (480, 640)
"""Pictures of a step of a published setting at most, and the size of their files, px."""
CUT = {
    "method.crops.max_per_image": 8,
    "method.banks": "all",
    "method.neighbours.stored": 3,
    "method.neighbours.drawn": 3,
}
"""Keys of published settings that would take hours here, or that random weights give nothing for."""
HALF = 1.5
"""Times the floor from which on it is said who spends the most of what is above it."""


def defaults(threads: int) -> list[str]:
    """Words of all rows."""
    return ["trainer=cpu", f"trainer.threads={threads}", "trainer.precision=32-true"]


def default(method: str, threads: int, quick: bool = False) -> Setting:
    """A method as `run.py train method=…` trains it, on fewer scenes."""
    words = [f"method={method}", "data=scenes", "data.val_count=1", *defaults(threads)]
    batch = config.compose(words).data.batch_size
    few = ["data.batch_size=4", "data.train_size=64", "data.eval_size=64"] if quick else []
    count = 16 if quick else max(PICTURES, 2 * batch)
    small = stepping.known_words(words, {"method.neighbours.stored": 7, "method.neighbours.drawn": 3}) if quick else []
    return Setting(method, "default", (*words, *few, *small, f"data.train_count={count}"))


def published(method: str, threads: int) -> Setting | None:
    """A method at its published setting, cut to what two cores do; None where no figure is published."""
    recipe = stepping.recipe(method)
    if recipe is None:
        return None
    words = [f"experiment={recipe}", "backbone.weights=none", "backbone.precision=float32", *defaults(threads)]
    cfg = config.compose(words)
    batch = min(cfg.data.batch_size, BATCH)
    small = stepping.known_words(words, CUT)
    kept = [f"batch {batch} of {cfg.data.batch_size}", *(word.removeprefix("method.") for word in small)]
    return Setting(
        method, recipe, (*words, "phases=[]", f"data.batch_size={batch}", *small), ", ".join(kept), (batch, FILES)
    )


def settings(only: str, threads: int, quick: bool) -> list[Setting]:
    """The rows that are asked for."""
    found = []
    for method in registry.names():
        found.append(default(method, threads, quick))
        other = None if quick else published(method, threads)
        found += [] if other is None else [other]
    return [setting for setting in found if only in f"{setting.method} {setting.name}"]


def measure(job: tuple[Setting, int]) -> list[Cost]:
    """The costs of one setting, in a process of its own."""
    setting, steps = job
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        return stepping.costs(setting, Path(folder), steps)


def quiet() -> None:
    """No messages of a run: the table alone."""
    setup.begin()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def row(setting: Setting, cost: Cost) -> list[str]:
    """The cells of one line."""
    spent = sorted(cost.parts.items(), key=lambda part: -part[1])
    most = [f"{name} {seconds:.3g}" for name, seconds in spent[:2] if seconds > 0.1 * cost.backbone]
    return [
        setting.method,
        setting.name + (f" ({setting.cut})" if setting.cut else ""),
        cost.unit,
        f"{cost.seconds:.3g}",
        f"{cost.backbone:.3g}",
        f"{cost.times:.2f}",
        ", ".join(most) if cost.times > HALF else "-",
        "-" if cost.data is None else f"{cost.data:.3g}",
        f"{cost.mib:.0f}",
    ]


HEAD = [
    "method", "setting", "unit", "CPU s", "of the backbone", "times its floor", "most of the rest, s", "data s", "MiB",
]  # fmt: skip


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def replaced(text: str, table: str) -> str:
    """The page with the table between the two marks. Raises ValueError where it has none."""
    before, first, rest = text.partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not first or not last:
        raise ValueError(f"{RESULTS.name}: lacks the lines {FIRST} and {LAST}, between which the table stands")
    return f"{before}{FIRST}\n{table}\n{LAST}{after}"


def main(words: list[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", metavar="WORD", help="rows whose method or setting holds this word")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="rows at a time")
    parser.add_argument("--steps", type=int, default=2, help="steps that count")
    parser.add_argument("--quick", action="store_true", help="tiny sizes of the defaults: does it run, not how fast")
    parser.add_argument("--write", action="store_true", help="put the table into benchmarks/RESULTS.md")
    args = parser.parse_args(words)
    chosen = settings(args.only, args.threads, args.quick)
    if not chosen:
        parser.error(f"--only {args.only}: no method or setting has this word; methods: {', '.join(registry.names())}")
    said = f"{machine(args.threads)}; median of {args.steps} steps behind a first one, {args.jobs} rows at a time"
    lines = [said, "", line(HEAD), line(["---"] * len(HEAD))]
    print("\n".join(lines), flush=True)
    # Forked, so that what is imported here is not imported a second time, and counts in no row.
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        jobs = [(setting, args.steps) for setting in chosen]
        for setting, found in zip(chosen, pool.imap(measure, jobs, chunksize=1), strict=True):
            for cost in found:
                lines.append(line(row(setting, cost)))
                print(lines[-1], flush=True)
    if args.write:
        RESULTS.write_text(replaced(RESULTS.read_text(), "\n".join(lines)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
