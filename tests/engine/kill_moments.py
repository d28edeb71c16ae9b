"""Kill a small training at many moments, start it again, and compare with one that was not killed.

`python -m tests.engine.kill_moments [--kills 20] [--method hidden_positives] [--seed 0] [--moments WORD,WORD]`

Each training is a process that gets SIGKILL: first at the named moments of MOMENTS (inside the call, by itself), then
at random ones of its wall time (from outside). The same configuration goes on in a new process. It survived where every
weight, every score of metrics.json and all of metrics.csv are those of the unkilled run, to the bit, and nothing half
written is left. The processes are forked from one that has imported everything and computed nothing.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import config
from engine import checkpoints, setup, training
from engine.callbacks.run_keeper import RunKeeper
from engine.records import run_folder
from lightning_modules.base import UnsupervisedSegmenter
from reporting import report
from tests.conftest import read_json, small_words

MORE = ("trainer.max_steps=18", "trainer.val_every=6", "trainer.checkpoint_every=2", "trainer.threads=1")
"""Longer than other small runs, with a checkpoint every other step."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_in(owner: Any, name: str, call: int, wrong: Callable[..., Any] | None = None) -> None:
    """The process ends in the call of this number of `owner.name`: before it, or after `wrong` did a part of it."""
    plain, calls = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            if wrong is not None:
                wrong(plain, *args, **kwargs)
            die()
        return plain(*args, **kwargs)

    setattr(owner, name, wrapped)


def half_written(plain: Callable[..., Any], content: Any, handle: Any) -> None:
    """Half of a checkpoint reaches the disk."""
    plain(content, handle)
    handle.truncate(handle.tell() // 2)
    handle.flush()


def done(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    plain(*args, **kwargs)


MOMENTS: dict[str, Callable[[], None]] = {
    "checkpoint-half-written": lambda: dies_in(checkpoints, "write", 4, half_written),
    "checkpoint-written-not-renamed": lambda: dies_in(checkpoints, "write", 5, done),
    "checkpoint-one-name-of-two": lambda: dies_in(checkpoints, "keep_as", 3, done),
    "best-saved-last-not": lambda: dies_in(checkpoints, "keep_as", 5),
    "validation": lambda: dies_in(UnsupervisedSegmenter, "validation_step", 4),
    "validation-scored-not-saved": lambda: dies_in(RunKeeper, "offer", 2, done),
    "metrics-csv": lambda: dies_in(run_folder.History, "add", 9, done),
    "preparation": lambda: dies_in(UnsupervisedSegmenter, "on_fit_start", 1),
    "closing-evaluation": lambda: dies_in(UnsupervisedSegmenter, "validation_step", 6),
    "closing-scores-written": lambda: dies_in(report, "write_scores", 1),
    "before-metrics-json": lambda: dies_in(report, "write_json", 2),
}
"""Words for moments -> what makes a process end there."""


def start(words: list[str], moment: str | None = None) -> int:
    """The id of a process that trains; it ends at the moment."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        if moment is not None:
            MOMENTS[moment]()
        training.train(config.compose(words))
        code = 0
    finally:
        os._exit(code)  # nothing of the parent is cleaned up here


def ended(pid: int) -> int:
    """Wait; the exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def difference(folder: Path, plain: Path) -> str | None:
    """The first thing in which a run is not the unkilled one; None where there is none."""
    one, two = (read_json(path / "metrics.json") for path in (plain, folder))
    for key in (one.keys() | two.keys()) - {"train_images_per_second"}:
        if one.get(key) != two.get(key):
            return f"{key}: {two.get(key)} in place of {one.get(key)}"
    if (plain / "metrics.csv").read_bytes() != (folder / "metrics.csv").read_bytes():
        return "metrics.csv"
    for name in (checkpoints.LAST, checkpoints.BEST):
        one, two = (setup.read_checkpoint(path / "checkpoints" / name)["state_dict"] for path in (plain, folder))
        for key in one.keys() | two.keys():
            if key not in one or key not in two or not torch.equal(one[key], two[key]):
                return f"{name}: {key}"
    left = [path.name for path in folder.rglob(".*") if path.name[1:].rpartition(".")[2].isdigit()]
    return f"left behind: {left}" if left else None


def reached(folder: Path) -> str:
    """How far a killed run had come."""
    metrics = folder / "metrics.csv"
    rows = metrics.read_text().splitlines()[1:] if metrics.is_file() else []
    unfinished = len(list((folder / "checkpoints").glob(".*.ckpt.*")))
    return f"after row {rows[-1].split(',')[0] if rows else 0}" + (", a checkpoint half written" if unfinished else "")


def survive(method: str, kills: int, seed: int, named: list[str], parent: Path) -> int:
    """Kill and go on so many times; prints a line each. Returns how many ended as the unkilled run."""

    def words(name: str) -> list[str]:
        return small_words(method, *MORE, f"run.dir={parent}", f"run.name={name}")

    began = time.perf_counter()
    if ended(start(words("plain"))):
        raise RuntimeError("the unkilled run failed")
    length = time.perf_counter() - began
    draw, survived = random.Random(seed), 0
    for number in range(kills):
        name = f"killed{number:02d}"
        if number < len(named):
            moment = named[number]
            code = ended(start(words(name), moment))
        else:
            delay, code = draw.uniform(0.0, length), 0
            while code == 0:  # it was faster than the unkilled run: sooner, then
                shutil.rmtree(parent / name, ignore_errors=True)
                moment = f"{delay:.2f} s of {length:.2f}"
                pid = start(words(name))
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
                code = ended(pid)
                delay *= 0.8
        if code != -signal.SIGKILL:
            raise RuntimeError(f"{moment}: ended with code {code} and was not killed")
        place = reached(parent / name)
        again = ended(start(words(name)))
        wrong = f"the second start ended with code {again}" if again else difference(parent / name, parent / "plain")
        survived += wrong is None
        print(f"{moment}, {place}: {'survived' if wrong is None else wrong}", flush=True)
    return survived


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.engine.kill_moments", description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--method", default="hidden_positives")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--moments", default=",".join(MOMENTS), help="named moments, which come first")
    args = parser.parse_args()
    named = [word for word in args.moments.split(",") if word]
    if unknown := [word for word in named if word not in MOMENTS]:
        parser.error(f"--moments: {unknown[0]} is none of {', '.join(MOMENTS)}")
    with tempfile.TemporaryDirectory() as folder:
        survived = survive(args.method, args.kills, args.seed, named, Path(folder))
    print(f"survived {survived} of {args.kills}")
    return 0 if survived == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
