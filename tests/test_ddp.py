"""Two real processes equal one at the same global batch, to float32 rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run as entry
from engine import setup
from tests.conftest import METHODS, read_json, run_small, small_words

pytestmark = pytest.mark.ddp

ROUNDING = 2e-4
"""Weights after eight steps of AdamW differ by the order of sums alone; a wrong batch split moves them by 1e-2."""


def run_two(method: str, parent: Path, *more: str) -> Path:
    """The small run as two processes that Lightning starts; returns its folder."""
    words = small_words(
        method, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true"
    )
    words = [word for word in words if word != "trainer=cpu"]
    command = [sys.executable, "run.py", "train", *words, f"run.dir={parent}", "run.name=two", *more]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(entry.__file__).parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return parent / "two"


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(method, small_run, tmp_path):
    one = small_run(method)
    folder = run_two(method, tmp_path)
    weights = setup.read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert weights.keys() == one.weights.keys()
    for name, value in one.weights.items():
        if name.startswith("kmeans_probe."):
            continue  # k-means may end in another optimum for codes that differ in the last bit
        assert torch.allclose(weights[name].float(), value.float(), rtol=0, atol=ROUNDING), name
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
