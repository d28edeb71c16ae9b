"""SIGKILL at named and at random moments of a training, each followed by a start that ends as if nothing had been."""

import os
import sys

import pytest

from tests.support.processes import ROOT, ran


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
