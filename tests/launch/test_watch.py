"""How far a comparison or a sweep is: names of trainings, what is left, where the log is."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from engine.callbacks import progress, screen
from launch import trials
from launch.trials import Queue, Trial
from launch.watch import Watch
from tests.support.terminals import bars, in_terminal, rows

ROOT = Path(trials.__file__).parents[1]
STAND_IN = """
import json, os, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(words["run.dir"]) / words["run.name"]
folder.mkdir()
print("closing", os.environ.get("LABELFREE_CLOSING_SECONDS"))
for step in range(4):
    state = {"what": "training", "step": step, "steps": 4, "left": 9.0 - step, "scores": "cluster 20.3 mIoU"}
    pathlib.Path(os.environ["LABELFREE_PROGRESS"]).write_text(json.dumps(state))
    time.sleep(0.7)
(folder / "environment.json").write_text('{"seconds": 30.0, "closing_seconds": 4.0}')
(folder / "metrics.json").write_text('{"val/cluster/miou": 20.5, "headline": "cluster"}')
"""
QUEUE = """
import pathlib, sys
from launch import trials
folder = pathlib.Path(sys.argv[1])
trials.ROOT = folder
made = [trials.Trial(i, {"method": "stego", "seed": i}, [f"run.dir={folder}", f"run.name=t{i}"], folder / f"t{i}")
        for i in range(3)]
sys.exit(trials.Queue("comparison", folder, made, None).run())
"""


def made(folder: Path, *values: dict) -> list[Trial]:
    return [Trial(i, value, [], folder / f"t{i}") for i, value in enumerate(values)]


def test_names(tmp_path):
    one, other = made(tmp_path, {"method": "stego", "seed": 2}, {"seed": 3, "optim.head.lr": 0.001})
    watch = Watch([one, other])
    assert watch.name(one) == "[1/2] stego seed 2"
    assert watch.name(other) == "[2/2] seed 3, lr 0.001"
    other.values = {"method.terms.self.weight": 0.123456, "method.terms.random.weight": 1, "optim.head.lr": 1e-3}
    assert watch.name(other) == "[2/2] self.weight 0.123, random.weight 1, lr 0.001"
    assert one.log == tmp_path / "t0.log"


def test_what_is_left_follows_the_method_where_it_is_known(tmp_path):
    pairs = [{"method": name, "seed": seed} for name in ("a", "b") for seed in (0, 1)]
    first, second, third, fourth = found = made(tmp_path, *pairs)
    watch = Watch(found)
    assert watch.left(first) is None  # nothing is known yet
    watch.started, watch.state = time.perf_counter() - 40.0, {"left": 60.0}
    assert watch.left(first) == pytest.approx(60 + 3 * 100, abs=1)  # the others as the one that runs
    first.state, first.seconds, first.closing = "finished", 100.0, 7.0
    watch.state = {}
    assert watch.left(second) == 100 + 2 * 100
    second.state, second.seconds = "finished", 120.0
    assert watch.left(third) == 2 * 110
    third.state, third.seconds, third.closing = "finished", 500.0, 90.0
    assert watch.left(fourth) == 500
    watch.state = {"left": 30.0}
    assert watch.left(fourth) == 30
    assert watch.variables(fourth) == {progress.CLOSING_VARIABLE: "90.0"}
    assert watch.variables(second) == {progress.CLOSING_VARIABLE: "7.0"}


def test_a_queue_says_which_training_it_is_at_and_where_its_log_is(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.py").write_text(
        STAND_IN.replace('os.environ["LABELFREE_PROGRESS"]', '"/dev/null"').replace("0.7", "0")
    )
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    found = [
        Trial(i, {"method": "stego", "seed": i}, [f"run.dir={tmp_path}", f"run.name=t{i}"], tmp_path / f"t{i}")
        for i in range(3)
    ]
    (tmp_path / "t0").mkdir()
    (tmp_path / "t0" / "metrics.json").write_text(json.dumps({"val/cluster/miou": 1.0, "headline": "cluster"}))
    (tmp_path / "t0" / "environment.json").write_text('{"seconds": 60.0}')  # of a version without closing_seconds
    assert Queue("comparison", tmp_path, found, None).run() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"comparison {tmp_path}: 3 trials",
        f"[1/3] stego seed 0: is finished ({tmp_path}/t0)",
        f"[2/3] stego seed 1: about 2:00 left of all; log: {tmp_path}/t1.log",
        "trial t1: val/cluster/miou 20.50 (30 s)",
        f"[3/3] stego seed 2: about 0:45 left of all; log: {tmp_path}/t2.log",
        "trial t2: val/cluster/miou 20.50 (30 s)",
    ]
    assert (tmp_path / "t1.log").read_text() == "closing None\n"
    assert (tmp_path / "t2.log").read_text() == "closing 4.0\n"
    assert not list(tmp_path.glob(".t*"))
    assert screen.current() is None


@pytest.mark.ddp
def test_a_queue_in_a_terminal(tmp_path):
    (tmp_path / "run.py").write_text(STAND_IN)
    code, written = in_terminal([sys.executable, "-c", QUEUE, str(tmp_path)], ROOT)
    assert code == 0, written
    found, shown = rows(written), bars(written)
    assert f"[1/3] stego seed 0: log: {tmp_path}/t0.log" in " ".join(found)
    assert any(
        re.search(r"\[2/3\] stego seed 1 +━.* [0-3]/4 about 0:0\d left, 0:\d\d of all cluster 20.3 mIoU", row)
        for row in shown
    )
    assert "trial t2: val/cluster/miou 20.50 (30 s)" in found
    assert not list(tmp_path.glob(".t*"))
