"""Two real processes equal one at the same global batch, to float32 rounding."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

import run as entry
from engine import setup
from tests.conftest import METHODS, Run, read_json, run_small, small_words
from tests.datamodules.pictures import noise, save
from tests.support import held_norms
from tests.support.processes import ran

pytestmark = pytest.mark.ddp

ROOT = Path(entry.__file__).parent
ROUNDING = 2e-4
"""Weights after eight steps of AdamW differ by the order of sums alone; a wrong batch split moves nine of ten more."""

UNSETTLED = 1e-3
"""Share of a tensor that may differ by more, up to five times: AdamW divides a gradient by its own size, and so
follows the rounding of one that is nearly zero. One process on two threads differs so from itself on one."""


def command_of(method: str, parent: Path, *more: str, processes: int = 2, script: str | Path = "run.py") -> list[str]:
    """The command of the small run as two processes (or more) that Lightning starts."""
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={processes}", "trainer.precision=32-true"]
    words = [word for word in small_words(method, *ddp, *more) if word != "trainer=cpu"]
    return [sys.executable, str(script), "train", *words, f"run.dir={parent}", "run.name=two"]


def run_two(
    method: str, parent: Path, *more: str, processes: int = 2, script: str | Path = "run.py", warm: bool = True
) -> Path:
    """The processes that train the small run; returns its folder. warm: forked off one that has imported everything."""
    command = command_of(method, parent, *more, processes=processes, script=script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = ran if warm else partial(subprocess.run, capture_output=True, text=True)
    done = start(command, cwd=ROOT, env=environment, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return parent / "two"


@pytest.fixture(scope="module")
def small_two(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of the small run of a method by two processes, trained once; whoever changes it takes a copy. That of
    `kmeans_baseline` is started as a user does."""
    return cache(lambda name: run_two(name, tmp_path_factory.mktemp("two"), warm=name != "kmeans_baseline"))


NOT_COMPARED = re.compile(r"^kmeans_probe\.|^hierarchy\.|\.qkv\.bias$")
"""k-means may end in another optimum for codes that differ in the last bit. Biases of keys move no softmax: their
gradient is rounding alone, of which Adam makes whole steps. Of HSG's transformers that holds for much more (their first
self-attention sees one target for all queries); what they do is in the losses, all of which are compared."""


def expect_equal(folder: Path, one: Run) -> None:
    """The weights of a run of several processes are those of the run of one."""
    weights = setup.read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights.keys() == one.weights.keys()
    for name, value in one.weights.items():
        if NOT_COMPARED.search(name):
            continue
        apart = (weights[name].double() - value.double()).abs()
        beyond = int((apart > ROUNDING).sum())
        assert beyond <= UNSETTLED * apart.numel(), f"{name}: {beyond} of {apart.numel()}"
        assert float(apart.max()) < 5 * ROUNDING, f"{name}: {float(apart.max()):.1e}"


OF_ONE_RANK = ("train/teacher_spread",)
"""What DINO watches a rank's own batch by: spreads, whose mean over ranks is not that of the whole batch."""


def expect_equal_losses(folder: Path, one: Run) -> None:
    """metrics.csv has the losses of the whole batch at every step."""
    curves = []
    for path in (folder, one.folder):
        with (path / "metrics.csv").open(newline="") as handle:
            curves.append([row for row in csv.DictReader(handle) if row["train/cluster_probe"]])
    assert len(curves[0]) == len(curves[1]) == 8
    for key in curves[1][0]:
        if key.startswith("train/") and key not in OF_ONE_RANK:
            two, whole = ([float(row[key] or "nan") for row in rows] for rows in curves)  # a phase may lack it
            assert two == pytest.approx(whole, rel=1e-3, abs=1e-4, nan_ok=True), key


IN_TEST_SLOW = ("deep_spectral", "normalized_cut", "tokencut")
"""Half a minute each; their stage has two-process tests of its own in `make test`."""


def with_held_norms(parent: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Run, Path]:
    """HSG by one process, and the folder of its run by two, without what multiplies rounding: with held norms
    (held_norms.py), and balanced groups, whose segments do not lie between two (collapse 1, as published)."""
    words = ["method.weights.collapse=1"]
    script = parent / "held.py"
    script.write_text(held_norms.SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    alone = run_two("hsg", parent / "one", *words, script=script, processes=1)
    return Run(alone, read_json(alone / "metrics.json")), run_two("hsg", parent, *words, script=script)


@pytest.mark.parametrize(
    "method", [pytest.param(name, marks=pytest.mark.slow) if name in IN_TEST_SLOW else name for name in METHODS]
)
def test_two_processes_equal_one(method, small_run, small_two, tmp_path, monkeypatch):
    if method == "hsg":
        one, folder = with_held_norms(tmp_path, monkeypatch)
    else:
        one, folder = small_run(method), small_two(method)
    expect_equal(folder, one)
    expect_equal_losses(folder, one)
    metrics = read_json(folder / "metrics.json")
    for key in ("val/cluster/acc", "val/linear/acc", "val/linear/miou"):
        assert abs(metrics[key] - one.metrics[key]) < 0.5, key
    assert len(list((folder / "panels").glob("*.png"))) >= 2


def test_two_processes_fit_the_posthoc_probe_of_one(tmp_path):
    epochs = "evaluation.posthoc.epochs=3"
    one = run_small("kmeans_baseline", tmp_path, "one", epochs)
    weights = setup.read_checkpoint(run_two("kmeans_baseline", tmp_path, epochs) / "checkpoints" / "last.ckpt")
    for name in ("posthoc_probe.classifier.weight", "posthoc_probe.classifier.bias"):
        assert torch.allclose(weights["state_dict"][name], one.weights[name], rtol=0, atol=ROUNDING), name


def test_four_processes_equal_one(small_run, tmp_path):
    """One picture a process in training, and five validation pictures for four."""
    expect_equal(run_two("hidden_positives", tmp_path, processes=4), small_run("hidden_positives"))


@pytest.mark.parametrize("method", ["hidden_positives", pytest.param("stego", marks=pytest.mark.slow)])
def test_local_contrast_is_another_training_with_the_same_memory(method, small_run, tmp_path):
    """`trainer.contrast=local`: pictures of other processes are no negatives; memory is still that of all."""
    one = small_run(method)
    folder = run_two(method, tmp_path, "trainer.contrast=local")
    weights = setup.read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    apart = max(
        float((weights[name] - value).abs().max()) for name, value in one.weights.items() if name.startswith("head.")
    )
    assert apart > 5 * ROUNDING
    for name in ("pool.agnostic", "pool.agnostic_filled") if method == "hidden_positives" else ("shift_steps",):
        assert torch.allclose(weights[name], one.weights[name], atol=1e-5), name


def test_ranks_without_a_valid_pixel_wait_for_nobody(tmp_path):
    """Two labelled pictures among eight: batches leave ranks without one, and three are validated."""
    for i in range(8):
        save(tmp_path / "tree" / "images" / "train" / f"{i}.png", noise(48, 48, seed=i))
    for i in range(2):
        save(
            tmp_path / "tree" / "labels" / "train" / f"{i}.png", np.arange(48 * 48, dtype=np.uint8).reshape(48, 48) % 3
        )
    for i in range(3):
        save(tmp_path / "tree" / "images" / "val" / f"{i}.png", noise(48, 48, seed=20 + i))
        save(tmp_path / "tree" / "labels" / "val" / f"{i}.png", np.full((48, 48), i, np.uint8))
    (tmp_path / "tree" / "classes.json").write_text('["a", "b", "c"]')
    data = ["data=folder", f"data.root={tmp_path}/tree"]
    one = run_small("hidden_positives", tmp_path, "one", *data)
    assert one.metrics["val/linear/acc"] is not None
    expect_equal(run_two("hidden_positives", tmp_path, *data), one)


def test_both_processes_skip_a_damaged_checkpoint(small_two, small_run, tmp_path):
    """last.ckpt is cut; both go on from best.ckpt, and the first one puts the damaged file aside."""
    folder = shutil.copytree(small_two("kmeans_baseline"), tmp_path / "two")
    (folder / "metrics.json").unlink()
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    expect_equal(run_two("kmeans_baseline", tmp_path), small_run("kmeans_baseline"))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept == ["best.ckpt", "last.ckpt", "last.ckpt.damaged"]


SKIPPING = """
import sys
import run
from common import distributed
from dataclasses import replace
from lightning_modules.hidden_positives import HiddenPositives

real = HiddenPositives.loss

def skips(self, views, features):
    found = real(self, views, features)
    return replace(found, skip=self.global_step == 3 and distributed.rank() == distributed.world_size() - 1)

HiddenPositives.loss = skips
if __name__ == "__main__":
    sys.exit(run.main())
"""


def test_a_step_skipped_on_one_rank_is_skipped_on_all(small_run, tmp_path, monkeypatch):
    """The last rank alone asks for it, at step 3: as if one process had skipped that step."""
    script = tmp_path / "skipping.py"
    script.write_text(SKIPPING)
    monkeypatch.setenv("PYTHONPATH", str(Path(entry.__file__).parent))
    two = run_two("hidden_positives", tmp_path / "a", script=script)
    alone = run_two("hidden_positives", tmp_path / "b", script=script, processes=1)
    one = Run(alone, read_json(alone / "metrics.json"))
    expect_equal(two, one)
    moved = one.weights["head.linear.weight"] - small_run("hidden_positives").weights["head.linear.weight"]
    assert moved.abs().max() > 5 * ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training", "evaluation"])
def test_a_signal_to_the_first_process_stops_both(during, small_run, tmp_path):
    """The scheduler knows the first process alone; the second one stops with it, and both go on together."""
    command, environment = command_of("kmeans_baseline", tmp_path), {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "two"

    def reached() -> bool:
        if during == "training":
            return (folder / "checkpoints" / "last.ckpt").exists()
        return (folder / "metrics.csv").exists() and "\n8," in (folder / "metrics.csv").read_text()

    while process.poll() is None and not reached():
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 85, err
    assert "stopped by SIGUSR1" in err
    metrics = read_json(run_two("kmeans_baseline", tmp_path) / "metrics.json")
    for key in ("val/cluster/acc", "val/linear/acc", "val/linear/miou"):
        assert abs(metrics[key] - small_run("kmeans_baseline").metrics[key]) < 0.5, key
