"""Sweeps without W&B: two real trials; and the launcher around a stand-in for run.py that ends as it is told."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch import sweep, trials
from tests.conftest import small_words
from tests.support.processes import Program, ran

STAND_IN = """
import json, os, pathlib, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(words["run.dir"]) / words["run.name"]
folder.mkdir(exist_ok=True)
started = folder / "starts"
started.write_text(started.read_text() + "x" if started.exists() else "x")
seed = int(words["seed"])
if seed == 13:
    sys.exit("error: an unlucky number")
if seed == 60 and len(started.read_text()) == 1:
    signal.signal(signal.SIGUSR1, lambda *_: sys.exit(85))
    signal.signal(signal.SIGTERM, lambda *_: ((folder / "ended").touch(), sys.exit(143)))
    (folder / "ready").touch()
    time.sleep(60)
(folder / "environment.json").write_text('{"seconds": 1.0}')
metrics = {"val/cluster/miou": float(seed), "ntasks": os.environ.get("SLURM_NTASKS")}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""
"""Scores its seed; 13 fails, 60 waits for SIGUSR1 or SIGTERM at its first start."""


def write(path: Path, method: str = "grid", metric: str = "val/cluster/miou", **parameters: list) -> Path:
    tree = {
        "program": "run.py",
        "command": ["${program}", "train", "method=kmeans_baseline", "logger=wandb", "${args_no_hyphens}"],
        "method": method,
        "metric": {"name": metric, "goal": "maximize"},
        "parameters": {key: {"values": values} for key, values in parameters.items()},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    (found,) = folder.glob("sweeps/*/trials.csv")
    with found.open(newline="") as handle:
        return list(csv.DictReader(handle))


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(STAND_IN)
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.train
def test_two_trials_run_here_and_not_again(tmp_path, monkeypatch, capsys):
    path = write(tmp_path / "two.yaml", metric="val/kmeans/miou", seed=[0, 1])
    small = [word for word in small_words("kmeans_baseline", "trainer.max_steps=1") if not word.startswith("method=")]
    words = ["offline=true", f"sweep={path}", f"run.dir={tmp_path}", *small]
    assert sweep.main(words) == 0, capsys.readouterr()
    table = rows(tmp_path)
    assert [row["state"] for row in table] == ["finished", "finished"]
    scores = [float(row["val/kmeans/miou"]) for row in table]
    assert scores == sorted(scores, reverse=True)
    assert {row["seed"] for row in table} == {"0", "1"}
    assert scores[0] != scores[1]
    capsys.readouterr()
    monkeypatch.setattr(trials.subprocess, "Popen", lambda *_, **__: pytest.fail("a finished trial was run again"))
    assert sweep.main(words) == 0
    assert rows(tmp_path) == table
    assert f"{scores[0]:.2f}" in capsys.readouterr().out


def test_trials_are_sorted_and_a_failed_one_is_named_and_tried_again(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    path = write(stand_in / "s.yaml", seed=[3, 13, 20])
    words = ["offline=true", f"sweep={path}", f"run.dir={stand_in}"]
    assert sweep.main(words) == 1
    out = capsys.readouterr().out
    assert "run here: OFFLINE=1 asks for it\n" in out
    assert re.search(r"trial 001-\w{6}: failed: error: an unlucky number \(all of it: \S+/001-\w{6}\.log\)\n", out)
    assert [(row["seed"], row["state"]) for row in rows(stand_in)] == [
        ("20", "finished"), ("3", "finished"), ("13", "failed"),
    ]  # fmt: skip
    assert all('"ntasks": null' in file.read_text() for file in stand_in.glob("sweeps/*/*/metrics.json"))
    assert sweep.main(words) == 1
    starts = {file.parent.name[:3]: file.read_text() for file in stand_in.glob("sweeps/*/*/starts")}
    assert starts == {"000": "x", "001": "xx", "002": "x"}


def test_shares_of_a_job_array_make_one_sweep(stand_in, capsys):
    path = write(stand_in / "s.yaml", seed=[1, 2, 3])
    words = [f"sweep={path}", f"run.dir={stand_in}"]
    assert sweep.main([*words, "part=1/2"]) == 0
    assert [(row["seed"], row["state"]) for row in rows(stand_in)] == [
        ("2", "finished"), ("1", "waiting"), ("3", "waiting"),
    ]  # fmt: skip
    assert sweep.main([*words, "part=0/2"]) == 0
    assert [row["seed"] for row in rows(stand_in)] == ["3", "2", "1"]
    assert "3 trials, 2 of them here" in capsys.readouterr().out


def test_bayes_runs_here_without_a_key_and_can_be_prolonged(stand_in, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(stand_in / "none"))
    path = write(stand_in / "s.yaml", "bayes", seed=[1, 2, 3, 4, 5])
    assert sweep.main([f"sweep={path}", f"run.dir={stand_in}", "trials=2"]) == 0
    out = capsys.readouterr().out
    assert "run here: no key of W&B was found\n" in out
    assert "method bayes: Optuna proposes the trials from the scores of those before (optuna.journal)\n" in out
    assert len(rows(stand_in)) == 2
    assert sweep.main([f"sweep={path}", f"run.dir={stand_in}", "trials=3"]) == 0
    assert len(rows(stand_in)) == 3  # prolonged, in the same folder


def waiting(folder: Path, path: Path) -> tuple[list[str], Program]:
    """The command of a sweep, and its process once the trial of seed 60 waits."""
    code = f"import pathlib, sys; from launch import sweep, trials; trials.ROOT = pathlib.Path({str(folder)!r}); "
    code += "sys.exit(sweep.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "offline=true", f"sweep={path}", f"run.dir={folder}"]
    process = Program(command)
    while process.poll() is None and not list(folder.glob("sweeps/*/*/ready")):
        time.sleep(0.01)
    return command, process


@pytest.mark.ddp
@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
def test_a_killed_sweep_takes_its_trial_along(stand_in):
    _, process = waiting(stand_in, write(stand_in / "s.yaml", seed=[60, 1]))
    process.kill()
    process.communicate(timeout=60)
    for _ in range(3000):
        if list(stand_in.glob("sweeps/*/*/ended")):
            return
        time.sleep(0.01)
    raise AssertionError("the trial runs on")


@pytest.mark.ddp
def test_a_signal_stops_the_trial_and_the_sweep_and_the_same_command_goes_on(stand_in):
    command, process = waiting(stand_in, write(stand_in / "s.yaml", seed=[60, 1]))
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 85, out
    assert re.search(r"stopped in trial 000-\w{6}; the same command goes on\n", out)
    assert [row["state"] for row in rows(stand_in)] == ["stopped", "waiting"]
    done = ran(command, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [(row["seed"], row["state"]) for row in rows(stand_in)] == [("60", "finished"), ("1", "finished")]


def test_with_a_key_the_server_of_wandb_guides_the_agent(stand_in, monkeypatch, capsys):
    import wandb

    asked, started = [], []
    monkeypatch.setattr(sweep, "why_here", lambda offline: None)
    monkeypatch.setattr(wandb, "sweep", lambda tree, **where: asked.append((tree, where)) or "abc123")

    def run(command, **settings):
        started.append((command, settings["env"]["PATH"].split(os.pathsep)[0]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(trials.subprocess, "run", run)
    path = write(stand_in / "s.yaml", seed=[1, 2])
    words = ["data=folder", "data.root=/pics", "wandb.entity=us"]
    assert sweep.main([f"sweep={path}", "trials=2", *words]) == 0
    ((tree, where),) = asked
    assert tree["command"] == [
        "${program}",
        "train",
        "method=kmeans_baseline",
        "logger=wandb",
        *words,
        "${args_no_hyphens}",
    ]
    assert where == {"entity": "us", "project": "labelfree"}
    agent = [sys.executable, "-m", "wandb", "agent", "--forward-signals", "--count", "2", "us/labelfree/abc123"]
    assert started == [(agent, str(Path(sys.executable).parent))]
    assert "wandb agent --forward-signals us/labelfree/abc123\n" in capsys.readouterr().out


def test_a_server_that_cannot_be_reached(monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert sweep.why_here(False).startswith("127.0.0.1 cannot be reached (")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert sweep.why_here(False) == "WANDB_MODE=offline"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "sweep: is needed; write sweep=hidden_positives or another file of configs/sweep"),
        (["offline=yes"], "offline=yes: expected true or false"),
        (["trials=0"], "trials=0: expected a whole number of at least 1"),
        (["part=8/8"], "part=8/8: expected i/n with i from 0 to n - 1, as a job array gives it"),
        (["run.name=x"], "run.name=x: each trial of a sweep has a name of its own; set run.dir"),
        (["optim.hed.lr=1"], "optim.hed.lr: no such key; did you mean optim.head.lr?"),
    ],
)
def test_wrong_words_end_in_one_line_before_the_first_trial(words, line, capsys, tmp_path):
    named = [] if not words else ["sweep=stego_grid", f"run.dir={tmp_path}"]
    named += [] if words == ["offline=yes"] else ["offline=true"]
    assert sweep.main([*named, *words]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert not list(tmp_path.iterdir())


def test_a_method_beside_a_sweep_of_another_one_is_refused(capsys):
    assert sweep.main(["sweep=stego_grid", "method=hidden_positives", "offline=true"]) == 2
    said = "the sweep stego_grid is of stego; leave the method out, or name another sweep"
    assert capsys.readouterr().err == f"error: method=hidden_positives: {said}\n"
    assert sweep.main(["sweep=", "offline=true"]) == 2
