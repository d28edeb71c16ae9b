"""`make sweep`: the trials of a sweep file, by W&B's server and agent, or here where there is no key or no network.

`python -m launch.sweep sweep=hidden_positives [offline=true] [trials=20] [part=0/8] data=… key=value …`. Here every
trial is a run folder below `<run.dir>/sweeps/<name>/`, trained by a process of its own. The same command goes on:
finished trials are not run again, a trial that was killed is resumed.
"""

import csv
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import config
from common.errors import AGAIN, ConfigError, LabelfreeError
from common.files import whole
from launch import space
from launch.space import Sweep
from launch.submit import ROOT, count

SECONDS = 5
"""How long the server of W&B is waited for."""

STOPPED = (AGAIN, 128 + signal.SIGTERM, 128 + signal.SIGUSR1, 130, -signal.SIGUSR1, -signal.SIGTERM)
"""Exit codes of a trial that was asked to stop, and goes on with the next start."""


@dataclass
class Trial:
    """One trial: its values, its run folder, and what became of it."""

    index: int
    values: dict[str, Any]
    words: list[str]
    folder: Path
    state: str = "waiting"
    score: float | None = None
    seconds: float | None = None
    note: str = field(default="")

    def look(self, target: str) -> None:
        """Take the state and the score from the run folder."""
        metrics = self.folder / "metrics.json"
        if metrics.is_file():
            self.state, self.score = "finished", json.loads(metrics.read_text()).get(target)
        environment = self.folder / "environment.json"
        if self.score is not None and environment.is_file():
            self.seconds = json.loads(environment.read_text())["seconds"]


class LocalSweep:
    """The trials of a sweep on this machine, one after the other."""

    def __init__(self, sweep: Sweep, words: Sequence[str], trials: int | None) -> None:
        self.sweep = sweep
        shared = config.parse_words([*sweep.words, *words])
        parent = Path(shared.pop("run.dir", "runs"))
        if "run.name" in shared:
            raise ConfigError(
                f"run.name={shared['run.name']}: each trial of a sweep has a name of its own; set run.dir"
            )
        same = [f"{key}={value}" for key, value in shared.items()]
        ranges = {**sweep.tree, "run_cap": None, "command": None}  # more trials, or another command, are the same sweep
        mark = hashlib.sha256(repr((ranges, same)).encode()).hexdigest()[:6]
        self.folder = (parent / "sweeps" / f"{sweep.path.stem}-{mark}").resolve()
        self.trials = []
        for index, values in enumerate(sweep.trials(trials)):
            own = [space.word(key, value) for key, value in values.items()]
            name = f"{index:03d}-{hashlib.sha256(repr(own).encode()).hexdigest()[:6]}"
            run_words = [*same, *own, f"run.dir={self.folder}", f"run.name={name}"]
            config.compose(run_words)  # a wrong key or value ends before the first trial
            self.trials.append(Trial(index, values, run_words, self.folder / name))
        self.process: subprocess.Popen | None = None
        self.asked = 0

    def run(self, part: int = 0, parts: int = 1) -> int:
        """Run the trials `part`, `part + parts`, … that are not finished; returns an exit code.

        0: all of them are finished, 1: some failed, another one: that of a trial which was asked to stop.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = self.trials[part::parts]
        print(f"sweep {self.folder}: {len(self.trials)} trials" + (f", {len(mine)} of them here" if parts > 1 else ""))
        former = {number: signal.signal(number, self.forward) for number in (signal.SIGUSR1, signal.SIGTERM)}
        try:
            for trial in mine:
                trial.look(self.sweep.target)
                if trial.state == "finished":
                    continue
                code = self.train(trial)
                self.report(trial)
                if self.asked or code in STOPPED:
                    print(f"stopped in trial {trial.folder.name}; the same command goes on")
                    return code or 128 + self.asked
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)
        return 1 if any(trial.state == "failed" for trial in mine) else 0

    def train(self, trial: Trial) -> int:
        """One trial in a process of its own; its output goes into `<trial>.log`."""
        environment = {key: value for key, value in os.environ.items() if key not in DROPPED}
        log = trial.folder.with_suffix(".log")
        with log.open("a") as output:
            command = [sys.executable, str(ROOT / "run.py"), "train", *trial.words]
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            if self.asked:  # the signal came while the process was being made
                self.process.send_signal(self.asked)
            code = self.process.wait()
        trial.look(self.sweep.target)
        if code in STOPPED:
            trial.state = "stopped"
        elif code:
            lines = log.read_text(errors="replace").strip().splitlines()
            trial.state, trial.note = "failed", (lines or [f"exit code {code}"])[-1]
        return code

    def forward(self, signum: int, frame: Any) -> None:
        """A scheduler wants this process to stop: the trial that runs saves itself and ends; no further one begins."""
        self.asked = signum
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signum)

    def report(self, trial: Trial) -> None:
        """One line about a trial that has ended."""
        if trial.state == "finished":
            print(
                f"trial {trial.folder.name}: {self.sweep.target} {shown(trial.score)} ({trial.seconds:.0f} s)",
                flush=True,
            )
        elif trial.state == "failed":
            print(f"trial {trial.folder.name}: failed: {trial.note} (all of it: {trial.folder}.log)", flush=True)

    def ranked(self) -> list[Trial]:
        """All trials, the best first; those without a score after those with one."""
        for trial in self.trials:
            if trial.state == "waiting":
                trial.look(self.sweep.target)
        sign = -1 if self.sweep.maximized else 1
        return sorted(self.trials, key=lambda t: (t.score is None, sign * (t.score or 0.0), t.index))

    def table(self) -> Table:
        """The trials sorted by the target; also written to trials.csv in the sweep's folder."""
        ranked, keys = self.ranked(), list(self.sweep.tree["parameters"])
        with whole(self.folder / "trials.csv") as path, path.open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["trial", self.sweep.target, "state", "seconds", *keys])
            for trial in ranked:
                row = [trial.folder.name, trial.score, trial.state, trial.seconds]
                writer.writerow([*row, *(trial.values[key] for key in keys)])
        table = Table(title=f"{self.sweep.target} ({self.sweep.tree['metric']['goal']})", title_justify="left")
        for name in ("trial", self.sweep.target.removeprefix("val/"), *keys):
            table.add_column(name, overflow="fold")
        for trial in ranked:
            score = trial.state if trial.score is None else shown(trial.score)
            table.add_row(trial.folder.name, score, *(str(trial.values[key]) for key in keys))
        return table


DROPPED = ("LABELFREE_RUN_NAME", "SLURM_NTASKS")
"""Not handed on: a trial has its own name, and starts its devices by itself even where this process is a SLURM task."""


def shown(score: float | None) -> str:
    """A score with two digits; a run may lack the target (a label-based one without labels)."""
    return "-" if score is None else f"{score:.2f}"


def why_here(offline: bool) -> str | None:
    """Why the trials are run here and not by W&B; None where W&B can be asked."""
    from engine.setup import has_wandb_key

    if offline:
        return "OFFLINE"
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if not has_wandb_key():
        return "no key of W&B was found"
    server = urllib.parse.urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    if proxy:
        server = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}")
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=SECONDS).close()
    except OSError as error:
        return f"{server.hostname} cannot be reached ({error})"
    return None


def run_wandb(sweep: Sweep, words: list[str], trials: int | None) -> int:
    """Make the sweep on W&B's server and run its agent here; more agents may join from other machines."""
    import wandb

    cfg = config.compose([*sweep.words, *words])
    project, entity = cfg.wandb.project, cfg.wandb.entity
    tree = {**sweep.tree, "command": sweep.command(words)}
    number = wandb.sweep(tree, entity=entity, project=project)
    path = "/".join(part for part in (entity, project, number) if part)
    print(f"further agents, on other machines or as a job array: wandb agent --forward-signals {path}", flush=True)
    command = [
        sys.executable,
        "-m",
        "wandb",
        "agent",
        "--forward-signals",
        *(["--count", str(trials)] if trials else []),
    ]
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # the agent starts `python`
    return subprocess.run([*command, path], cwd=ROOT, env={**os.environ, "PATH": search}).returncode


def main(argv: list[str] | None = None) -> int:
    """Run a sweep; 0: done, 1: a trial failed, 2: something for the user to mend, 85 and 143: stopped by a signal."""
    words = sys.argv[1:] if argv is None else argv
    try:
        named = config.parse_words(words)
        offline = config.flag(named, "offline")
        name, raw, part = (named.pop(key, None) for key in ("sweep", "trials", "part"))
        if name is None:
            raise ConfigError("sweep: is needed; write sweep=hidden_positives or another file of configs/sweep")
        rest = [f"{key}={value}" for key, value in named.items()]
        sweep, trials = space.read(space.find(name)), None if raw is None else count("trials", raw, 1)
        first, parts = part_of(part)
        reason = "part" if part else why_here(offline)
        if reason is None:
            return run_wandb(sweep, rest, trials)
        local = LocalSweep(sweep, rest, trials)
        if not part:
            print(f"run here: {reason}")
        if sweep.tree["method"] == "bayes":
            print("method bayes needs W&B's server; here the same ranges are drawn from at random")
        if "early_terminate" in sweep.tree:
            print("early_terminate is done by W&B's server; here every trial runs to its end")
        started = time.perf_counter()
        code = local.run(first, parts)
        Console(width=None if sys.stdout.isatty() else 140).print(local.table())
        print(f"{local.folder / 'trials.csv'}; {time.perf_counter() - started:.0f} s")
        return code
    except LabelfreeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def part_of(text: str | None) -> tuple[int, int]:
    """`2/8` -> (2, 8): the third of eight shares. Raises ConfigError."""
    first, _, parts = (text or "0/1").partition("/")
    if not (first.isdecimal() and parts.isdecimal() and int(first) < int(parts)):
        raise ConfigError(f"part={text}: expected i/n with i from 0 to n - 1, as a job array gives it")
    return int(first), int(parts)


if __name__ == "__main__":
    sys.exit(main())
