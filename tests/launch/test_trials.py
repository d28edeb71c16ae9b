"""Queues of trainings: codes of trials that do not listen yet, and two processes that want the same trial."""

import fcntl
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from launch import trials
from launch.trials import Queue, Trial

STAND_IN = """
import pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[2:])
folder = pathlib.Path(words["run.dir"]) / words["run.name"]
folder.mkdir(exist_ok=True)
starts = folder / "starts"
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
time.sleep(float(words["seconds"]) if starts.read_text() == "x" else 0)
(folder / "environment.json").write_text('{"seconds": 1.0}')
(folder / "metrics.json").write_text('{"val/cluster/miou": 1.0}')
"""
"""In the place of run.py: takes its time at its first start, and does nothing about signals."""
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "run.py").write_text(STAND_IN)
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    monkeypatch.setattr(trials, "POLL", 0.05)
    return tmp_path


def queue(folder: Path, seconds: float) -> Queue:
    words = [f"run.dir={folder}", f"seconds={seconds}"]
    found = [Trial(i, {}, [*words, f"run.name=t{i}"], folder / f"t{i}") for i in range(2)]
    return Queue("sweep", folder, found, "val/cluster/miou")


def until(there) -> None:
    for _ in range(6000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("nothing came")


@pytest.mark.parametrize(("kind", "code"), [(signal.SIGTERM, 143), (signal.SIGUSR1, 85)])
def test_a_trial_that_does_not_listen_yet_ends_with_the_code_of_one_that_does(kind, code, folder, capsys):
    def ask() -> None:
        until((folder / "t0" / "starts").exists)
        os.kill(os.getpid(), kind)

    before = signal.getsignal(kind)
    threading.Thread(target=ask).start()
    assert queue(folder, 60).run() == code
    assert "stopped in trial t0; the same command goes on" in capsys.readouterr().out
    assert signal.getsignal(kind) == before
    assert queue(folder, 0).run() == 0


def run_quietly(folder: Path, seconds: float, name: str) -> None:
    with (folder / name).open("w", buffering=1) as sys.stdout:
        code = queue(folder, seconds).run()
    os._exit(code)


def test_two_equal_queues_at_once_train_once(folder):
    first = FORK.Process(target=run_quietly, args=(folder, 3, "first"))
    first.start()
    until((folder / "t0" / "starts").exists)
    second = FORK.Process(target=run_quietly, args=(folder, 3, "second"))
    second.start()
    for process in (first, second):
        process.join(120)
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert "trial t0: another process trains it; waiting for it\n" in (folder / "second").read_text()
    for name in ("first", "second"):
        lines = (folder / name).read_text().splitlines()
        assert not [line for line in lines if "failed" in line]
    assert [(folder / name / "starts").read_text() for name in ("t0", "t1")] == ["x", "x"]


def hold(path: Path) -> None:
    """What a training of another command does."""
    with path.open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        path.with_name("held").touch()
        until(path.with_name("enough").exists)
    os._exit(0)


@pytest.mark.parametrize("asked", [False, True])
def test_a_trial_that_another_command_trains_is_waited_for(asked, folder, capsys):
    (folder / "t0").mkdir()
    other = FORK.Process(target=hold, args=(folder / "t0" / ".lock",))
    other.start()
    until((folder / "t0" / "held").exists)

    def later() -> None:
        time.sleep(0.5)
        assert not (folder / "t0" / "starts").exists()
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            (folder / "t0" / "enough").touch()

    threading.Thread(target=later).start()
    assert queue(folder, 0).run() == (143 if asked else 0)
    (folder / "t0" / "enough").touch()
    other.join(60)
    out = capsys.readouterr().out
    assert re.findall("trial t0: .*", out)[0] == "trial t0: another process trains it; waiting for it"
    assert (folder / "t0" / "starts").exists() != asked
