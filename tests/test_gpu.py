"""Every method trains on a GPU: in float32 like on the CPU, in bfloat16 without losing its way."""

import csv
from pathlib import Path

import pytest
import torch

import config
from engine import training
from tests.conftest import METHODS, Run, small_words

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def on_gpu(method: str, parent: Path, precision: str) -> Run:
    words = [
        word for word in small_words(method, f"run.dir={parent}", f"run.name={precision}") if word != "trainer=cpu"
    ]
    metrics = training.train(config.compose([*words, "trainer=gpu", f"trainer.precision={precision}"]))
    return Run(parent / precision, metrics)


def losses(run: Run) -> list[float]:
    with (run.folder / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    key = "train/loss" if any(row.get("train/loss") for row in rows) else "train/cluster_probe"
    return [float(row[key]) for row in rows if row.get(key)]


@pytest.mark.parametrize("method", METHODS)
def test_the_first_steps_are_those_of_the_cpu(method, small_run, tmp_path):
    cpu, gpu = losses(small_run(method)), losses(on_gpu(method, tmp_path, "32-true"))
    assert gpu[:3] == pytest.approx(cpu[:3], rel=5e-3, abs=5e-3)


@pytest.mark.parametrize("method", METHODS)
def test_bfloat16_follows_float32(method, small_run, tmp_path):
    run = on_gpu(method, tmp_path, "bf16-mixed")
    assert losses(run) == pytest.approx(losses(small_run(method)), rel=0.1, abs=0.1)
    assert run.metrics["val/kmeans/miou"] > 0
