"""`make sweep`: the trials of a sweep file, by W&B's server and agent, or here where there is no key or no network.

`python -m launch.sweep sweep=hidden_positives [offline=true] [trials=20] [part=0/8] data=… key=value …`. Here every
trial is a run folder below `<run.dir>/sweeps/<name>/`, trained by a process of its own. The same command goes on:
finished trials are not run again, a trial that was killed is resumed. With method: bayes Optuna proposes the trials
(`launch.bayes`), and every process with the same words works on the same sweep.
"""

import csv
import hashlib
import os
import socket
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

import config
from common.ending import ended
from common.errors import ConfigError
from common.files import whole
from common.machine import has_wandb_key
from engine.records.identity import mark
from evaluation import headline
from launch import space
from launch.space import Sweep
from launch.submit import ROOT, count
from launch.trial import brief
from launch.trials import Queue, Trial, part_of, shown
from lightning_modules.facts import facts

SECONDS = 5
"""How long the server of W&B is waited for."""


class LocalSweep(Queue):
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
        of_ranges = hashlib.sha256(repr((ranges, same)).encode()).hexdigest()[:6]
        folder = (parent / "sweeps" / f"{sweep.path.stem}-{of_ranges}").resolve()
        super().__init__("sweep", folder, [], sweep.target)
        self.shared, self.study = same, None
        ahead = sweep.ends() if sweep.tree["method"] == "bayes" else sweep.trials(trials)
        cfgs = [self.configured(values) for values in ahead]  # a wrong key or value ends before the first trial
        from datamodules.folder import expect_apart  # imports torch, and a wrong word shall end without

        expect_apart(cfgs[0], **{"run.dir": parent})
        if sweep.tree["method"] != "bayes":
            for index, (values, cfg) in enumerate(zip(ahead, cfgs, strict=True)):
                self.add(index, values, cfg)
            return
        from launch.bayes import Study  # Optuna is imported where it is used alone

        self.study = Study(sweep, self.folder, sweep.number(trials))
        self.gather()

    def configured(self, values: dict[str, Any]) -> DictConfig:
        """The configuration of a trial with these values. Raises ConfigError."""
        return config.compose([*self.shared, *(space.word(key, value) for key, value in values.items())])

    def add(self, index: int, values: dict[str, Any], cfg: DictConfig) -> Trial:
        """One more trial."""
        name = f"{index:03d}-{mark(cfg)}"
        own = [space.word(key, value) for key, value in values.items()]
        run_words = [*self.shared, *own, f"run.dir={self.folder}", f"run.name={name}"]
        self.trials.append(Trial(index, values, run_words, self.folder / name))
        return self.trials[-1]

    def gather(self) -> None:
        """Of a study: the trials that it has by now, whichever process runs them."""
        found = {trial.index: trial for trial in self.trials}
        for index, (values, failed) in self.study.known().items():
            trial = found.get(index) or self.add(index, values, self.configured(values))
            if failed and trial.state == "waiting":
                trial.look(self.target)
                if trial.state == "waiting":
                    trial.state, trial.note = "failed", f"as said in {trial.log}"

    @property
    def number(self) -> int:
        """How many trials there are in all, with those that are not proposed yet."""
        return len(self.trials) if self.study is None else max(self.study.number, len(self.trials))

    def turns(self, mine: list[Trial]) -> Iterator[Trial]:
        """Of a study: what it hands out, and every end is told to it."""
        if self.study is None:
            yield from mine
            return
        while (taken := self.study.take()) is not None:
            index, values = taken
            trial = next((item for item in self.trials if item.index == index), None)
            if trial is None:
                trial = self.add(index, values, self.configured(values))
                self.watch.add(trial)
            yield trial
            self.study.tell(index, trial.score if trial.state == "finished" else None)

    def ranked(self) -> list[Trial]:
        """All trials, the best first; those without a score after those with one."""
        if self.study is not None:
            self.gather()
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
        heads = [self.sweep.target.removeprefix("val/").replace("/", "/\n")]
        heads += [brief(key, keys).replace(".", ".\n") for key in keys]  # broken at dots, not within words
        for name in ("trial", *heads):
            table.add_column(name, overflow="fold")
        for trial in ranked:
            score = trial.state if trial.score is None else shown(trial.score)
            table.add_row(trial.folder.name, score, *(str(trial.values[key]) for key in keys))
        return table


def headline_of(sweep: Sweep, words: list[str]) -> str:
    """The key of the score that the method of these trials is known by."""
    return headline.expected(facts(config.compose([*sweep.words, *words]).method.name).headline)


def why_here(offline: bool) -> str | None:
    """Why the trials are run here and not by W&B; None where W&B can be asked."""
    if offline:
        return "OFFLINE=1 asks for it"
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


def expect_method(sweep: Sweep, method: str | None) -> None:
    """Raises ConfigError where a method is named and the sweep file is of another one, or tries several."""
    own = config.parse_words(sweep.words).get("method")
    if method is not None and (own not in (None, method) or "method" in sweep.tree["parameters"]):
        raise ConfigError(
            f"method={method}: the sweep {sweep.path.stem} is of {own or 'several methods'}; leave the method out, or "
            "name another sweep"
        )


def main(argv: list[str] | None = None) -> int:
    """Run a sweep; 0: done, 1: a trial failed, 2: something for the user to mend, 85, 130 and 143: stopped."""
    return ended(lambda: swept(sys.argv[1:] if argv is None else argv))


def swept(words: list[str]) -> int:
    """The exit code of a sweep that these words ask for. Raises LabelfreeError."""
    named = config.parse_words(words)
    offline = config.flag(named, "offline")
    name, raw, part = (named.pop(key, None) for key in ("sweep", "trials", "part"))
    if not name:
        raise ConfigError("sweep: is needed; write sweep=hidden_positives or another file of configs/sweep")
    sweep, trials = space.read(space.find(name)), None if raw is None else count("trials", raw, 1)
    expect_method(sweep, named.get("method"))
    rest = [f"{key}={value}" for key, value in named.items()]
    config.compose([*sweep.words, *rest])  # a wrong word ends here, before anything heavy is imported
    if sweep.target == space.HEADLINE["name"]:
        sweep = sweep.following(headline_of(sweep, rest))
        print(f"target: {sweep.target}, the headline score of the method; it reads labels")
    first, parts = part_of(part)
    reason = "part" if part else why_here(offline)
    if reason is None:
        return run_wandb(sweep, rest, trials)
    local = LocalSweep(sweep, rest, trials)
    if not part:
        print(f"run here: {reason}")
    if local.study is not None:
        first, parts = 0, 1  # the study hands out the trials, to every process that asks
        print("method bayes: Optuna proposes the trials from the scores of those before (optuna.journal)")
    if "early_terminate" in sweep.tree:
        print("early_terminate is done by W&B's server; here every trial runs to its end")
    started = time.perf_counter()
    code = local.run(first, parts)
    Console(width=None if sys.stdout.isatty() else 140).print(local.table())
    print(f"{local.folder / 'trials.csv'}; {time.perf_counter() - started:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
