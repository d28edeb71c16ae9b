"""The table of costs in docs/methods/index.md: `python -m docs.costs [METHOD ...] [--steps N] [--runs FOLDER]`.

Runs every method, or those that are named, with its own yaml on some scenes, one after the other on one core, and
writes what all finished runs of the folder took. A finished run is not run again; without `--steps` nothing is run.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import config
from engine import training
from lightning_modules import registry
from lightning_modules.facts import facts

PAGE = Path(__file__).parent / "methods" / "index.md"
START, END = "<!-- written by python -m docs.costs -->\n", "<!-- end -->\n"
HEAD = "| method | seconds per 100 steps | pictures of a step | offline stage beside it |\n|---|---|---|---|"
RUNS = Path("runs") / "costs"
MISSING = "not measured yet"


def words(method: str, steps: int, folder: Path) -> list[str]:
    """What a run is started with: the small defaults, and as little beside the training as there can be."""
    return [
        f"method={method}", "data=scenes", "data.train_count=200", "data.val_count=4", "data.workers=0", "trainer=cpu",
        f"trainer.max_steps={steps}", "trainer.val_every=1000000", "trainer.threads=1", "trainer.progress=none",
        "evaluation.panels=0", "evaluation.kmeans.pictures=20", "evaluation.kmeans.restarts=1", f"run.dir={folder}",
        f"run.name={method}",
    ]  # fmt: skip


def cost(folder: Path) -> dict[str, Any] | None:
    """`seconds` per 100 steps, the `batch` and where (`device`, `threads`) of a finished run; None for another."""
    if not (folder / "metrics.json").is_file():
        return None
    speed = json.loads((folder / "metrics.json").read_text())["train_images_per_second"]
    where = json.loads((folder / "environment.json").read_text())
    batch = config.read_yaml(folder / "config.yaml")["data"]["batch_size"]
    return {"seconds": 100 * batch / speed, "batch": batch, "device": where["device"], "threads": where["threads"]}


def table(folder: Path) -> str:
    """The lines of the table, a row for each registered method, and above it where it was measured."""
    found = {name: cost(folder / name) for name in registry.names()}
    places = sorted({f"{one['device']}, {one['threads']} thread(s)" for one in found.values() if one})
    rows = []
    for name, one in found.items():
        cells = [f"[{facts(name).title}]({name}.md)", MISSING if one is None else f"{one['seconds']:.3g}"]
        cells += ["" if one is None else str(one["batch"]), "yes" if facts(name).staged else ""]
        rows.append(f"| {' | '.join(cells)} |")
    said = f"Measured on: {'; '.join(places)}.\n\n" if places else ""
    return "\n".join([f"{said}{HEAD}", *rows, ""])


def page(text: str, folder: Path) -> str:
    """The text of the page with its table as it has to be."""
    before, _, rest = text.partition(START)
    return f"{before}{START}\n{table(folder)}\n{END}{rest.partition(END)[2]}"


def main(given: Sequence[str] | None = None) -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(prog="python -m docs.costs", description=__doc__.split("\n")[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="all where none is named")
    parser.add_argument("--steps", type=int, default=0, metavar="N", help="steps of each run; 0: run nothing")
    parser.add_argument("--runs", type=Path, default=RUNS, metavar="FOLDER", help=f"where runs are kept ({RUNS})")
    args = parser.parse_args(given)
    for method in (args.methods or registry.names()) if args.steps else []:
        training.train(config.compose(words(method, args.steps, args.runs)))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), args.runs), encoding="utf-8")


if __name__ == "__main__":
    main()
