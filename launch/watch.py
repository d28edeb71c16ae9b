"""How far a sweep or a comparison is: which training runs, what is left of it and of all, and where its log is."""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

from engine.callbacks import screen
from engine.callbacks.screen import CLOSING_VARIABLE, FILE_VARIABLE, clock
from launch.trial import Trial

EVERY = 0.5
"""Seconds between two looks at the training that runs."""


class Watch:
    """Looks at the trials of one queue, as many as run here."""

    def __init__(self, trials: Sequence[Trial], open_ones: int = 0) -> None:
        """`open_ones`: how many trials will come that are not known yet."""
        self.trials, self.open_ones = list(trials), open_ones
        self.started = 0.0
        self.state: dict[str, Any] = {}

    def name(self, trial: Trial) -> str:
        """`[3/9] hidden_positives seed 0`."""
        return f"[{self.trials.index(trial) + 1}/{len(self.trials) + self.open_ones}] {trial.name}"

    def add(self, trial: Trial) -> None:
        """One of the open trials is known now."""
        self.trials.append(trial)
        self.open_ones = max(self.open_ones - 1, 0)

    def variables(self, trial: Trial) -> dict[str, str]:
        """What a training is told: where to say how far it is, and how long the closing work of earlier ones took."""
        known = self.alike(trial, [item for item in self.trials if item.closing is not None])
        closing = {CLOSING_VARIABLE: f"{mean(item.closing for item in known):.1f}"} if known else {}
        return closing if screen.current() is None else {FILE_VARIABLE: str(self.file(trial))} | closing

    def file(self, trial: Trial) -> Path:
        """Where the training says how far it is, while it runs."""
        return trial.folder.with_name(f".{trial.folder.name}.progress")

    def alike(self, trial: Trial, known: list[Trial]) -> list[Trial]:
        """Those of the same method among `known`, or all of them where there is none."""
        method = trial.values.get("method")
        return [item for item in known if item.values.get("method") == method] or known

    def left(self, running: Trial | None) -> float | None:
        """Seconds until all trainings are done, as those that are finished took; None where nothing is known yet."""
        known = [item for item in self.trials if item.state == "finished" and item.seconds]
        waiting = [item for item in self.trials if item.state == "waiting" and item is not running]
        waiting += [running] * self.open_ones if running is not None else []
        current = self.state.get("left") if running is not None else 0.0
        whole = None if current is None or running is None else time.perf_counter() - self.started + current
        total = 0.0
        for item in [*waiting, *([running] if running is not None and current is None else [])]:
            alike = self.alike(item, known)
            seconds = mean(other.seconds for other in alike) if alike else whole
            if seconds is None:
                return None
            total += seconds
        return total + (current or 0.0)

    def begin(self, trial: Trial, log: Path) -> None:
        """Say which training begins, and where its log is."""
        self.started, self.state = time.perf_counter(), {}
        left = self.left(trial)
        about = "" if left is None else f"about {clock(left)} left of all; "
        print(f"{self.name(trial)}: {about}log: {log}", flush=True)
        if (shown := screen.current()) is not None:
            shown.bar(self.name(trial), None)

    @contextmanager
    def looking(self, trial: Trial) -> Iterator[None]:
        """The training's file is gone behind it."""
        try:
            yield
        finally:
            self.file(trial).unlink(missing_ok=True)

    def wait(self, trial: Trial, process: subprocess.Popen) -> int:
        """Wait for the training, showing how far it is; returns its exit code."""
        while True:
            try:
                return process.wait(EVERY if screen.current() is not None else None)
            except subprocess.TimeoutExpired:
                self.show(trial)

    def show(self, trial: Trial) -> None:
        """Put what the training says of itself into the bar."""
        try:
            self.state = json.loads(self.file(trial).read_text())
        except (OSError, ValueError):
            return  # it has not begun
        everything = self.left(trial)
        left = f"about {clock(self.state['left'])} left"
        if everything is not None:
            left += f", {clock(everything)} of all"
        what = self.name(trial) + (f" {self.state['what']}" if self.state["what"] != "training" else "")
        screen.current().update(what, self.state["step"], self.state["scores"], left, self.state["steps"])


def mode(words: Sequence[str]) -> str:
    """The `trainer.progress` that the trainings are asked for, which is that of their queue too."""
    asked = [word.partition("=")[2] for word in words if word.startswith("trainer.progress=")]
    return asked[-1] if asked else "auto"
