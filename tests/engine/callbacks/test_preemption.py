"""Signals of a scheduler at moments that matter: inside a step, before and inside a validation, while it prepares."""

import os
import signal

import pytest

from common.errors import Stopped
from datamodules.scenes.module import SceneSource
from engine import setup
from engine.callbacks import preemption
from lightning_modules.kmeans_baseline import KMeansBaseline
from tests.conftest import run_small

pytestmark = pytest.mark.train


def kill_at(monkeypatch, hook: str, call: int, signum: int) -> None:
    """The process gets the signal inside the call of that number of a hook of the method, once."""
    plain, calls = getattr(KMeansBaseline, hook), []

    def wrapped(self, *args):
        calls.append(hook)
        if len(calls) == call:
            os.kill(os.getpid(), signum)
        return plain(self, *args)

    monkeypatch.setattr(KMeansBaseline, hook, wrapped)


@pytest.mark.parametrize(
    ("hook", "call", "signum", "line", "step"),
    [
        ("training_step", 2, signal.SIGUSR1, "stopped by SIGUSR1, saved at step 2; the same command goes on", 2),
        (
            "training_step", 4, signal.SIGTERM,
            "stopped by SIGTERM, at step 4, to go on from the last checkpoint; the same command goes on", 3,
        ),
        (
            "validation_step", 1, signal.SIGUSR1,
            "stopped by SIGUSR1, at step 4, to go on from the last checkpoint; the same command goes on", 3,
        ),
        (
            "validation_step", 4, signal.SIGUSR1,
            "stopped by SIGUSR1, at step 8, to go on from the last checkpoint; the same command goes on", 8,
        ),
    ],
)  # fmt: skip
def test_a_signalled_run_ends_as_one_that_was_not(hook, call, signum, line, step, small_run, tmp_path, monkeypatch):
    plain = small_run("kmeans_baseline")
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    kill_at(monkeypatch, hook, call, signum)
    marker = tmp_path / "requeue"
    monkeypatch.setenv(preemption.MARKER_VARIABLE, str(marker))
    with pytest.raises(Stopped) as caught:
        run_small("kmeans_baseline", tmp_path, "k")
    assert (str(caught.value), caught.value.code) == (line, 85 if signum == signal.SIGUSR1 else 143)
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
    assert marker.exists()
    assert not (tmp_path / "k" / "metrics.json").exists()
    assert setup.read_checkpoint(tmp_path / "k" / "checkpoints" / "last.ckpt")["global_step"] == step
    resumed = run_small("kmeans_baseline", tmp_path, "k")
    for key, value in plain.metrics.items():
        if key.startswith(("val/", "best/")):
            assert resumed.metrics[key] == value, key
    history = (tmp_path / "k" / "metrics.csv").read_text()
    assert history == (plain.folder / "metrics.csv").read_text()


def test_a_signal_while_a_picture_is_read_is_no_fault_of_the_data(tmp_path, monkeypatch):
    """Not even where the data set takes every Exception for a spoilt picture."""
    read, asked = SceneSource.read, []

    def own(self, index):
        try:
            handler = getattr(signal.getsignal(signal.SIGTERM), "__func__", None)
            if handler is preemption.Preemption.receive:  # the run listens by now
                asked.append(index)
                os.kill(os.getpid(), signal.SIGTERM)
            return read(self, index)
        except Exception as error:
            raise OSError("spoilt") from error

    monkeypatch.setattr(SceneSource, "read", own)
    with pytest.raises(Stopped) as caught:
        run_small("kmeans_baseline", tmp_path, "k")
    assert (caught.value.code, len(asked)) == (143, 1)


def test_a_run_that_only_prepares_stops_at_once(tmp_path, monkeypatch):
    kill_at(monkeypatch, "on_fit_start", 1, signal.SIGUSR1)
    with pytest.raises(Stopped) as caught:
        run_small("kmeans_baseline", tmp_path, "k")
    assert str(caught.value) == (
        "stopped by SIGUSR1, at step 0, to go on from the last checkpoint; the same command goes on"
    )
    assert not (tmp_path / "k" / "checkpoints" / "last.ckpt").exists()
