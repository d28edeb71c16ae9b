"""The line at the bottom of a terminal, in a pseudo-terminal; what it says; and that it costs next to nothing."""

import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import run
from engine.callbacks import progress, screen
from tests.conftest import small_words
from tests.support.terminals import bars, in_terminal, rows

ROOT = Path(run.__file__).parent
SCRIPT = """
import logging, os, sys, time, warnings
logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
from engine.callbacks import screen
log = logging.getLogger("labelfree")

def until_drawn(seconds):
    # until the thread of the bar has drawn what it says: late on a busy machine
    before, end = len(drawings), time.monotonic() + 60
    time.sleep(seconds)
    while len(drawings) < before + 2 and time.monotonic() < end:  # the first may have begun before
        time.sleep(0.01)

with screen.showing("auto"):
    shown, drawings = screen.current(), []
    draw = shown.progress.live.refresh  # what the thread calls
    shown.progress.live.refresh = lambda: (draw(), drawings.append(None))
    shown.bar("training", 40, 10)
    for step in range(11, 41):
        shown.update(done=step, left="about 0:01 left", text="loss 0.1")
        time.sleep(0.02)
        if step == 20:
            log.info("a line of the log")
            print("a printed line")
            warnings.warn("a warning")
            if os.fork() == 0:
                log.info("a line of a reader")
                os._exit(0 if screen.current() is None else 3)
            assert os.wait()[1] == 0
    until_drawn(0)
    shown.plan("closing", {"k-means": 4, "evaluation": 4})
    for _ in screen.counted(range(2), "k-means", 2):
        until_drawn(0.3)
    for _ in screen.counted(range(4), "evaluation", 4):
        time.sleep(0.1)
    with screen.within("best"):
        for _ in screen.counted(range(3), "k-means", 3):
            until_drawn(0.2)
log.info("behind it")
"""


@pytest.mark.ddp
def test_everything_else_goes_above_the_bar():
    code, written = in_terminal([sys.executable, "-c", SCRIPT], ROOT)
    assert code == 0, written
    found = rows(written)
    for line in ("a line of the log", "a printed line", "a line of a reader", "behind it"):
        assert line in found  # alone on its line
    assert any(row.endswith("UserWarning: a warning") for row in found)
    shown = bars(written)
    assert all(re.match(r"(training|closing|closing: (k-means|evaluation|best, k-means)) +━", row) for row in shown)
    assert any("10/40" in row or "11/40" in row for row in shown)
    assert any("about 0:01 left loss 0.1" in row for row in shown)
    assert any(row.startswith("closing: k-means") and " 2/8" in row for row in shown)  # one of two batches
    assert any(row.startswith("closing: best, k-means") and "/11" in row for row in shown)
    assert "Epoch" not in written


def test_where_a_bar_is_drawn(monkeypatch):
    streams = {name: SimpleNamespace(isatty=lambda name=name: terminals[name]) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setenv("TERM", "xterm")
    terminals = {"stdout": True, "stderr": True}
    assert [screen.progress_mode(mode) for mode in ("auto", "bar", "lines", "none")] == ["bar", "bar", "lines", "none"]
    monkeypatch.setenv("TERM", "dumb")
    assert screen.progress_mode("bar") == "lines"
    monkeypatch.setenv("TERM", "xterm")
    terminals = {"stdout": False, "stderr": True}  # run.py train > file
    assert [screen.progress_mode(mode) for mode in ("auto", "bar")] == ["lines", "bar"]
    terminals = {"stdout": True, "stderr": False}
    assert [screen.progress_mode(mode) for mode in ("auto", "bar")] == ["lines", "lines"]


def test_what_is_left_counts_validations_and_the_closing_work(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    pace = progress.Pace(total=100, val_every=25)
    clock.now = 100.0  # preparation belongs to no step
    for _ in range(30):
        pace.begin()
        clock.now += 2.0
        pace.end()
    assert pace.left(30) == 70 * 2.0
    pace.pause()
    clock.now += 50.0
    pace.validation = 10.0
    pace.begin()
    clock.now += 2.0
    pace.end()
    assert pace.step == 2.0
    assert pace.left(30) == 70 * 2.0 + 2 * 10.0 + 10.0  # at 50 and 75; the one at 100 is the closing work
    assert pace.left(75) == 25 * 2.0 + 10.0
    monkeypatch.setenv(progress.CLOSING_VARIABLE, "33.5")
    assert progress.Pace(100, 25).left(100) == 33.5


def test_a_step_is_counted_in_less_than_a_tenth_of_a_millisecond(monkeypatch):
    """Beside steps of ten milliseconds and more: below 1 %."""
    cfg = SimpleNamespace(trainer=SimpleNamespace(progress="none", log_every=10, val_every=1000))
    watched = progress.TrainingProgress(cfg, 2000)
    shown = screen.Screen()
    shown.bar("training", 2000)
    monkeypatch.setattr(screen, "_shown", [shown])
    trainer = SimpleNamespace(is_global_zero=True, global_step=0, callback_metrics={"train/loss": 0.5})
    started = time.process_time()
    for step in range(2000):
        trainer.global_step = step
        watched.on_train_batch_start(trainer, None, None, step)
        watched.on_train_batch_end(trainer, None, None, None, step)
    assert (time.process_time() - started) / 2000 < 1e-4


@pytest.mark.train
@pytest.mark.timeout(600)
def test_a_training_in_a_terminal(tmp_path):
    """One bar for the steps and one for what follows; scores as lines above; the loss is that of metrics.csv."""
    words = [*small_words("hidden_positives", f"run.dir={tmp_path}", "run.name=x"), "trainer.progress=auto"]
    words += ["trainer.max_steps=6", "trainer.val_every=3", "trainer.log_every=2"]
    code, written = in_terminal([sys.executable, "run.py", "train", *words], ROOT)
    assert code == 0, written
    shown = bars(written)
    kinds = {re.split(r" +━", row)[0].split(" ")[0] for row in shown}
    assert kinds <= {"training", "validation", "closing", "closing:"}
    assert "closing:" in kinds
    found = rows(written)
    assert sum(row.startswith("validation at step ") for row in found) >= 2  # and that of the best checkpoint
    assert not any("━" in row and "validation at step" in row for row in found)
    losses = {loss for row in shown for loss in re.findall(r"loss ([\d.]+)", row)}
    header, *lines = (tmp_path / "x" / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/loss")
    assert losses <= {f"{float(cells[column]):.4f}" for line in lines if (cells := line.split(","))[column]}
    assert re.search(r"closing_seconds\": \d", (tmp_path / "x" / "environment.json").read_text())
