"""Kills at named and at random moments of a training, each followed by a start that ends as if nothing had been."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

from tests.conftest import small_words
from tests.support.processes import ROOT, Program, ran


def survived(*words: str) -> str:
    """The last line of the kill test in a process of its own, on one thread."""
    command = [sys.executable, "-m", "tests.engine.kill_moments", *words]
    done = ran(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=1500)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    print(done.stdout)
    return done.stdout.splitlines()[-1]


@pytest.mark.train
def test_kills_inside_a_checkpoint_and_inside_a_validation():
    words = ["--method", "kmeans_baseline", "--kills", "3"]
    moments = "checkpoint-half-written,validation,closing-scores-written"
    assert survived(*words, "--moments", moments) == "survived 3 of 3"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["hidden_positives", "stego"])
def test_twenty_kills(method):
    assert survived("--method", method, "--kills", "20", "--seed", "1") == "survived 20 of 20"


def hears_ctrl_c() -> None:
    """In the child: shells start background jobs, and so perhaps these tests, deaf to SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.ddp
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_a_killed_process_goes_on(kind, tmp_path, small_run):
    """kill -9, Ctrl-C or a scheduler's signal in the middle, then the same command: numbers as if not killed.

    Ctrl-C finds programs as a user starts them, the others find forks that have imported everything.
    """
    plain = small_run("kmeans_baseline")
    words = small_words("kmeans_baseline", f"run.dir={tmp_path}", "run.name=k")
    command = [sys.executable, "run.py", "train", *words]
    last = tmp_path / "k" / "checkpoints" / "last.ckpt"
    if kind == signal.SIGINT:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hears_ctrl_c)
        again = partial(subprocess.run, capture_output=True, text=True)
    else:
        process, again = Program(command, cwd=ROOT), ran
    while process.poll() is None and not last.exists():
        time.sleep(0.01)
    process.send_signal(kind)
    _, err = process.communicate(timeout=120)
    if kind == signal.SIGINT:
        assert process.returncode == 130, err
        assert "of 8; the same command goes on" in err
        assert "Traceback" not in err
    if kind in (signal.SIGUSR1, signal.SIGTERM):
        assert process.returncode == {signal.SIGUSR1: 85, signal.SIGTERM: 143}[kind], err
        assert re.search(rf"stopped by {kind.name}, .* step \d.*; the same command goes on", err)
        assert "Traceback" not in err
    done = again(command, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "k" / "metrics.json").read_text())
    for key, value in plain.metrics.items():
        if key.startswith(("val/", "best/")):
            assert metrics[key] == value, key
