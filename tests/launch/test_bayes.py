"""`method: bayes` without W&B: Optuna around a stand-in for run.py whose score is a hill."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from common.errors import ConfigError
from launch import bayes, space, sweep, trials
from launch.bayes import JOURNAL, Study
from tests.support.processes import Program

STAND_IN = """
import json, math, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(words["run.dir"]) / words["run.name"]
folder.mkdir(exist_ok=True)
with (folder / "starts").open("a") as starts:
    starts.write("x")
top = pathlib.Path(sys.argv[0]).parent
if (top / "wait").exists():
    (folder / "ready").touch()
    time.sleep(60)
time.sleep(float((top / "pause").read_text()) if (top / "pause").exists() else 0)
if words["seed"] == "3":
    sys.exit("error: an unlucky number")
rate = float(words["optim.head.lr"])
(folder / "environment.json").write_text('{"seconds": 1.0}')
score = 50 - 10 * abs(math.log10(rate) + 3) - abs(int(words["seed"]) - 5)
(folder / "metrics.json").write_text(json.dumps({"val/cluster/miou": score}))
"""
"""Best at a rate of 1e-3 and seed 5; seed 3 fails; waits where there is a file `wait` until it is killed."""

PARAMETERS = {
    "optim.head.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-1},
    "seed": {"min": 0, "max": 9},
}


def write(path: Path, goal: str = "maximize", **changed) -> Path:
    tree = {
        "program": "run.py",
        "command": ["${program}", "train", "method=kmeans_baseline", "${args_no_hyphens}"],
        "method": "bayes",
        "run_cap": 6,
        "metric": {"name": "val/cluster/miou", "goal": goal},
        "parameters": PARAMETERS,
        **changed,
    }
    tree["command"][2:3] = ["method=stego"]
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(STAND_IN)
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    return tmp_path


def rows(folder: Path) -> list[dict[str, str]]:
    (found,) = folder.glob("sweeps/*/trials.csv")
    with found.open(newline="") as handle:
        return sorted(csv.DictReader(handle), key=lambda row: row["trial"])


def proposed(folder: Path) -> list[tuple[str, str]]:
    return [(row["optim.head.lr"], row["seed"]) for row in rows(folder)]


def command(folder: Path, runs: Path, *words: str) -> list[str]:
    code = f"import pathlib, sys; from launch import sweep, trials; trials.ROOT = pathlib.Path({str(folder)!r}); "
    code += "sys.exit(sweep.main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "offline=true", f"sweep={folder / 's.yaml'}", f"run.dir={runs}", *words]


def starts(runs: Path) -> list[str]:
    return [path.read_text() for path in sorted(runs.glob("sweeps/*/*/starts"))]


def study_of(runs: Path, path: Path, number: int = 6) -> Study:
    (journal,) = runs.glob(f"sweeps/*/{JOURNAL}")
    return Study(space.read(path), journal.parent, number)


def test_one_process_proposes_the_same_trials_twice_and_tells_ends_and_failures(stand_in, capsys):
    path = write(stand_in / "s.yaml", run_cap=16)
    for runs in ("one", "two"):
        sweep.main(["offline=true", f"sweep={path}", f"run.dir={stand_in / runs}"])
    assert proposed(stand_in / "one") == proposed(stand_in / "two")
    assert len(set(proposed(stand_in / "one"))) == 16
    states = {row["state"] for row in rows(stand_in / "one")}
    with study_of(stand_in / "one", path).alone() as study:
        told = {item.number: (item.state.name, item.value) for item in study.trials}
        assert study.direction.name == "MAXIMIZE"
    assert len(told) == 16
    for number, row in enumerate(rows(stand_in / "one")):
        failed = row["seed"] == "3"
        assert told[number] == (("FAIL", None) if failed else ("COMPLETE", float(row["val/cluster/miou"])))
        assert row["state"] == ("failed" if failed else "finished")
    assert "failed" in states
    capsys.readouterr()
    assert sweep.main(["offline=true", f"sweep={path}", f"run.dir={stand_in / 'one'}"]) == 1  # as it was
    assert starts(stand_in / "one") == ["x"] * 16


def test_it_learns_from_the_scores(stand_in):
    """Behind the ten random trials of TPE the rates are nearer to the best one than drawn ones are."""
    path = write(stand_in / "s.yaml", parameters={**PARAMETERS, "seed": {"value": 5}}, run_cap=30)
    assert sweep.main(["offline=true", f"sweep={path}", f"run.dir={stand_in}"]) == 0
    away = [abs(math.log10(float(rate)) + 3) for rate, _ in proposed(stand_in)]
    assert sum(away[-10:]) / 10 < 0.6 < sum(away[:10]) / 10


@pytest.mark.ddp
@pytest.mark.skipif(sys.platform != "linux", reason="the signal at a parent's death is Linux's")
def test_a_killed_sweep_goes_on_with_no_trial_lost_or_doubled(stand_in):
    path = write(stand_in / "s.yaml", run_cap=3)
    killed, whole = stand_in / "killed", stand_in / "whole"
    (stand_in / "wait").touch()
    process = Program(command(stand_in, killed))
    while process.poll() is None and not list(killed.glob("sweeps/*/*/ready")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    (stand_in / "wait").unlink()
    (journal,) = killed.glob(f"sweeps/*/{JOURNAL}")
    with journal.open("a") as handle:
        handle.write('{"op_code": 4, "wor')  # as a killed process leaves it
    for runs in (killed, whole):
        assert sweep.main(["offline=true", f"sweep={path}", f"run.dir={runs}"]) in (0, 1)
    assert proposed(killed) == proposed(whole)
    assert starts(killed) == ["xx", "x", "x"]
    with study_of(killed, path, 3).alone() as study:
        assert [item.state.is_finished() for item in study.trials] == [True] * 3


@pytest.mark.ddp
def test_two_processes_share_one_sweep(stand_in, capsys):
    path = write(stand_in / "s.yaml", parameters={**PARAMETERS, "seed": {"min": 4, "max": 9}})
    (stand_in / "pause").write_text("0.5")
    runs = stand_in / "runs"
    other = Program(command(stand_in, runs, "part=0/2"))
    while other.poll() is None and not starts(runs):
        time.sleep(0.01)
    assert sweep.main(["offline=true", f"sweep={path}", f"run.dir={runs}", "part=1/2"]) == 0
    outs = [other.communicate(timeout=120)[0], capsys.readouterr().out]
    assert other.returncode == 0, outs
    assert starts(runs) == ["x"] * 6
    names = [folder.parent.name for folder in runs.glob("sweeps/*/*/metrics.json")]
    shares = [sum(f"trial {name}: val/cluster/miou" in out for name in names) for out in outs]
    assert sum(shares) == len(names) == 6
    assert min(shares) >= 1
    assert not list(runs.glob("sweeps/*/.*.claim"))


def test_a_trial_that_another_process_has_is_not_taken(tmp_path):
    checked = space.read(write(tmp_path / "s.yaml", "minimize"))
    one, other = Study(checked, tmp_path, 2), Study(checked, tmp_path, 2)
    first, second = one.take(), other.take()
    assert (first[0], second[0], one.take(), other.take()) == (0, 1, None, None)
    one.tell(0, 12.0)
    del one
    for handle in other.claims.values():
        handle.close()  # as the end of its process does
    assert Study(checked, tmp_path, 2).take() == second
    with other.alone() as study:
        assert (study.best_value, study.direction.name) == (12.0, "MINIMIZE")


def test_values_are_those_of_wandbs_words(tmp_path):
    specs = {
        "whole": {"min": 1, "max": 3},
        "flat": {"min": 0.5, "max": 2.0},
        "log": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "steps": {"distribution": "q_uniform", "min": 0, "max": 10, "q": 5},
        "log_steps": {"distribution": "q_log_uniform_values", "min": 1, "max": 100, "q": 2},
        "listed": {"values": [True, 1, "x", [1, 2]]},
        "fixed": {"value": [7]},
    }
    study = Study(space.read(write(tmp_path / "s.yaml", parameters=specs)), tmp_path, 60)
    found = []
    for _ in range(60):
        number, values = study.take()
        found.append(values)
        study.tell(number, 1.0 * number)
    column = {name: [values[name] for values in found] for name in specs}
    assert {type(item) for item in column["whole"]} == {int}
    assert set(column["whole"]) == {1, 2, 3}
    assert all(0.5 <= item <= 2.0 and float(f"{item:.6g}") == item for item in column["flat"])
    assert all(1e-4 <= item <= 1e-1 for item in column["log"])
    assert set(column["steps"]) == {0, 5, 10}
    assert all(item % 2 == 0 and 0 <= item <= 100 for item in column["log_steps"])
    assert {repr(item) for item in column["listed"]} == {"True", "1", "'x'", "[1, 2]"}
    assert all(item == [7] for item in column["fixed"])
    limits = bayes.distributions(study.sweep)
    assert set(limits) == set(specs) - {"fixed"}
    assert (limits["log"].log, limits["flat"].log, limits["log_steps"].log) == (True, False, True)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (
            {"distribution": "normal", "mu": 0.1, "sigma": 0.01},
            f"distribution=normal: method: bayes without W&B's server takes {bayes.BOUNDED}; write a range with min "
            "and max, or set method: random",
        ),
        (
            {"values": [0.1, 0.2], "probabilities": [0.9, 0.1]},
            "probabilities=[0.9, 0.1]: method: bayes without W&B's server learns them itself; leave them out, or set "
            "method: random",
        ),
    ],
)
def test_what_optuna_cannot_do_is_one_line(tmp_path, capsys, spec, line):
    path = write(tmp_path / "s.yaml", parameters={"optim.head.lr": spec})
    assert sweep.main(["offline=true", f"sweep={path}", f"run.dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err == f"error: {path}: parameters.optim.head.lr: {line}\n"
    assert not (tmp_path / "runs").exists()


def test_a_journal_that_is_spoilt_and_a_range_that_is_none_of_the_key_are_one_line(tmp_path, capsys):
    checked = space.read(write(tmp_path / "s.yaml"))
    (tmp_path / JOURNAL).write_text("no json\n{}\n")
    with pytest.raises(ConfigError, match=rf"{JOURNAL}: cannot be read .*; delete it, then the sweep begins anew"):
        Study(checked, tmp_path, 2).known()
    path = write(tmp_path / "s.yaml", parameters={"optim.head.lr": {"min": -1.0, "max": 1.0}})
    assert sweep.main(["offline=true", f"sweep={path}", f"run.dir={tmp_path / 'runs'}"]) == 2
    assert capsys.readouterr().err.startswith("error: optim.head.lr=-1: ")


def test_optuna_is_imported_where_it_is_used_alone():
    code = "import sys, launch.sweep, launch.space, launch.trials; sys.exit('optuna' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, cwd=Path(sweep.ROOT)).returncode == 0
