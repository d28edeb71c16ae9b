"""Trainings one after the other, each in a process of its own: what sweeps and comparisons are made of.

A trial is a run folder. One that is finished is not run again, one that was stopped goes on; a signal for this process
is handed to the training that runs.
"""

import ctypes
import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from common.errors import AGAIN, ConfigError, stop_code
from engine.callbacks import screen
from engine.records import run_lock
from launch import watch
from launch.submit import ROOT
from launch.trial import Trial

STOPPED = (AGAIN, *(128 + number for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)))
"""Exit codes of a trial that was asked to stop, and goes on with the next start."""
POLL = 1.0
"""Seconds between two looks at a trial that another process trains."""


DROPPED = ("LABELFREE_RUN_NAME", "SLURM_NTASKS")
"""Not handed on: a trial has its own name, and starts its devices by itself even where this process is a SLURM task."""


def _stop_with_parent() -> None:
    """In a new process: SIGTERM comes when its parent dies, however that happens (PR_SET_PDEATHSIG of Linux)."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


ORPHANED = _stop_with_parent if sys.platform == "linux" else None
"""A training whose queue is killed saves itself and ends; else it would keep its folder from the next start."""


class Queue:
    """Trials below a folder. `title`: what the first printed line calls them; `target`: the key of the score that is
    reported, None: the headline of each."""

    def __init__(self, title: str, folder: Path, trials: list[Trial], target: str | None) -> None:
        self.title, self.folder, self.trials, self.target = title, folder, trials, target
        self.process: subprocess.Popen | None = None
        self.shared: list[str] = []
        """Words of all trainings, where there is none yet to be asked for them."""
        self.watch = watch.Watch(trials)
        self.asked = 0

    def run(self, part: int = 0, parts: int = 1) -> int:
        """Run the trials `part`, `part + parts`, … that are not finished; returns an exit code.

        0: all of them are finished, 1: some failed, another one: that of a trial which was asked to stop.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = self.trials[part::parts]
        print(
            f"{self.title} {self.folder}: {self.number} trials" + (f", {len(mine)} of them here" if parts > 1 else ""),
            flush=True,
        )
        for trial in mine:
            trial.look(self.target)
        with screen.showing(watch.mode(mine[0].words if mine else self.shared)):
            return self.run_all(mine)

    @property
    def number(self) -> int:
        """How many trials there are in all."""
        return len(self.trials)

    def turns(self, mine: list[Trial]) -> Iterator[Trial]:
        """The trials to run, one after the other; what is behind a `yield` is done when that trial has ended, and is
        left where it was stopped."""
        yield from mine

    def run_all(self, mine: list[Trial]) -> int:
        """Run these trials; as `run`."""
        self.watch = watch.Watch(mine, max(self.number - len(self.trials), 0))
        former = {number: signal.signal(number, self.forward) for number in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            for trial in self.turns(mine):
                trial.look(self.target)  # another share of the array may have trained it meanwhile
                if trial.state == "finished":
                    print(f"{self.watch.name(trial)}: is finished ({trial.folder})", flush=True)
                    continue
                code = self.train(trial)
                self.report(trial)
                if self.asked or code in STOPPED:
                    print(f"stopped in trial {trial.folder.name}; the same command goes on", flush=True)
                    return code or stop_code(self.asked)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return 1 if any(trial.state == "failed" for trial in self.watch.trials) else 0

    def train(self, trial: Trial) -> int:
        """One trial in a process of its own; its output goes into `<trial>.log`. Returns its exit code, for a process
        that a signal ended before it could listen that of one which listens.

        One that another queue or command trains is waited for; where it is finished then, there is nothing to do.
        """
        environment = {key: value for key, value in os.environ.items() if key not in DROPPED}
        environment |= self.watch.variables(trial)
        with trial.log.open("a") as output:
            if not self.alone(trial, output):
                trial.state = "stopped"
                return stop_code(self.asked)
            trial.look(self.target)
            if trial.state == "finished":
                return 0
            self.watch.begin(trial, trial.log)
            with self.watch.looking(trial):
                code = self.started(trial, environment, output)
        code = stop_code(-code) if code < 0 else code
        trial.look(self.target)
        if code in STOPPED:
            trial.state = "stopped"
        elif code:
            lines = trial.log.read_text(errors="replace").strip().splitlines()
            trial.state, trial.note = "failed", (lines or [f"exit code {code}"])[-1]
        return code

    def started(self, trial: Trial, environment: dict[str, str], output: TextIO) -> int:
        """Start its process and wait for the end; the process's own code, negative for a signal."""
        command = [sys.executable, str(ROOT / "run.py"), "train", *trial.words]
        streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, env=environment, preexec_fn=ORPHANED, **streams)
        if self.asked:  # the signal came while the process was being made
            self.process.send_signal(self.asked)
        return self.watch.wait(trial, self.process)

    def alone(self, trial: Trial, log: TextIO) -> bool:
        """Wait until no other process trains the trial; False where a signal asks to stop meanwhile.

        The lock on the log keeps other queues out until this one and its training have closed it.
        """
        said = False
        while not locked(log) or run_lock.in_use(trial.folder):
            if self.asked:
                return False
            if not said:
                print(f"trial {trial.folder.name}: another process trains it; waiting for it", flush=True)
                said = True
            time.sleep(POLL)
        return True

    def forward(self, signum: int, frame: Any) -> None:
        """A scheduler wants this process to stop: the trial that runs saves itself and ends; no further one begins."""
        self.asked = signum
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)

    def report(self, trial: Trial) -> None:
        """One line about a trial that has ended."""
        if trial.state == "finished":
            print(
                f"trial {trial.folder.name}: {trial.target or 'score'} {shown(trial.score)} ({trial.seconds:.0f} s)",
                flush=True,
            )
        elif trial.state == "failed":
            print(f"trial {trial.folder.name}: failed: {trial.note} (all of it: {trial.log})", flush=True)


def locked(log: TextIO) -> bool:
    """Whether this process has the lock of a log now; True as well where the file system has no locks."""
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def shown(score: float | None) -> str:
    """A score with two digits; a run may lack the target (a label-based one without labels)."""
    return "-" if score is None else f"{score:.2f}"


def part_of(text: str | None) -> tuple[int, int]:
    """`2/8` -> (2, 8): the third of eight shares. Raises ConfigError."""
    first, _, parts = (text or "0/1").partition("/")
    if not (re.fullmatch("[0-9]{1,9}/[0-9]{1,9}", text or "0/1") and int(first) < int(parts)):
        raise ConfigError(f"part={text}: expected i/n with i from 0 to n - 1, as a job array gives it")
    return int(first), int(parts)
