"""Checkpoint writing, the choice of the best, the doctor, W&B without a key."""

import math
import os
from dataclasses import replace

import pytest
import torch
from PIL import Image

import config
from common.errors import TrainingError
from engine import checkpoints, doctor, setup
from engine.callbacks.run_keeper import RunKeeper, numbers
from engine.callbacks.screen import clock
from engine.callbacks.selection import Selection
from engine.checkpoints import WholeCheckpointIO
from engine.records.run_folder import RunFolder
from lightning_modules.hidden_positives import HiddenPositives
from reporting import panels
from tests.conftest import run_small


def test_a_checkpoint_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    WholeCheckpointIO().save_checkpoint({"step": 1}, path)

    def half(checkpoint, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoints.torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        WholeCheckpointIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path, weights_only=True) == {"step": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["last.ckpt"]


def test_the_best_is_the_highest_and_the_later_of_equals(tmp_path):
    keeper = RunKeeper(RunFolder(tmp_path, "new"), config.compose([]), Selection(("val/cluster/miou",)))
    values = {1: 5.0, 2: 7.0, 3: 6.0, 4: 7.0}
    offered = [keeper.offer(step, {"val/cluster/miou": value}) for step, value in values.items()]
    assert offered == [True, True, False, True]
    assert keeper.best_step == 4
    assert not keeper.offer(5, {})  # a step without the score chooses nothing


def test_without_labels_the_last_step_is_the_best(tmp_path):
    keeper = RunKeeper(RunFolder(tmp_path, "new"), config.compose([]), Selection())
    assert keeper.offer(1, {"val/cluster/entropy": 50.0})
    assert keeper.offer(2, {"val/cluster/entropy": 40.0})
    assert keeper.best_step == 2


def test_numbers_leave_out_what_is_not_finite():
    assert numbers({"val/a": torch.tensor(1.5), "val/b": float("nan"), "train/c": 1.0}, "val/") == {"val/a": 1.5}


def test_clock():
    assert [clock(seconds) for seconds in (5, 245, 3723)] == ["0:05", "4:05", "1:02:03"]


def test_doctor_finds_this_machine_healthy_but_for_what_it_says(tmp_path, capsys):
    lines = {name: (good, text) for name, good, text in doctor.findings(tmp_path)}
    assert lines["packages"][0]
    assert "torch" in lines["packages"][1]
    assert lines["search"][0], lines["search"]
    assert lines["run folder"] == (True, f"{tmp_path} is writable")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_doctor_sees_a_folder_that_cannot_be_written(tmp_path):
    tmp_path.chmod(0o500)
    lines = {name: (good, text) for name, good, text in doctor.findings(tmp_path / "runs")}
    assert not lines["run folder"][0]


@pytest.mark.train
def test_weights_that_are_not_finite_stop_the_run_and_leave_its_checkpoint(tmp_path, monkeypatch):
    real = HiddenPositives.loss

    def breaks(self, views, features):
        found = real(self, views, features)
        return replace(found, total=found.total * math.nan) if self.global_step == 4 else found

    monkeypatch.setattr(HiddenPositives, "loss", breaks)
    with pytest.raises(TrainingError) as caught:
        run_small("hidden_positives", tmp_path, "nan")
    assert str(caught.value) == (
        "step 5: weights of head, projection are not finite (train/loss nan); checkpoints are as they were before. "
        "Lower optim.head.lr, set its clip_norm, or try trainer.precision=32-true"
    )
    saved = setup.read_checkpoint(tmp_path / "nan" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 4
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.train
@pytest.mark.parametrize("method", ["kmeans_baseline", "hidden_positives"])
def test_panels_end_with_confidence_and_errors(small_run, method):
    sheet = Image.open(small_run(method).folder / "panels" / "sheet.png")
    assert sheet.width == 7 * (320 + panels.GAP) + panels.GAP  # picture, truth, cluster, kmeans, linear, and these two
    colours = {colour for _, colour in sheet.getcolors(1 << 24)}
    assert {panels.WRONG, *panels.CONFIDENCE_MARKS.values()} <= colours


@pytest.mark.train
def test_wandb_without_a_key_logs_offline_and_asks_nothing(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    run = run_small("kmeans_baseline", tmp_path, "w", "logger=wandb", "trainer.max_steps=2")
    offline = list((run.folder / "wandb").glob("offline-run-*"))
    assert len(offline) == 1
    assert next(iter(offline[0].glob("*.wandb"))).stat().st_size > 0
    stored = (run.folder / "wandb_id").read_text()
    assert offline[0].name.endswith(stored)  # a resumed run would go on under this id
    assert (run.folder / "metrics.csv").is_file()
