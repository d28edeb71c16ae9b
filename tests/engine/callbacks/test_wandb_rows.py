"""What W&B gets of a run that was killed: every step once. The offline files are read as W&B itself writes them."""

import csv
import json
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from common.spec import ClassMeta
from engine.callbacks.run_keeper import RunKeeper
from engine.callbacks.wandb_rows import StepLogger, masked_pictures
from engine.records import environment
from reporting.panels import Row
from tests.conftest import run_small

pytestmark = pytest.mark.train

BLOCK, HEADER, FIRST_BLOCK = 32768, 7, 7
"""Of LevelDB's log format, in which W&B keeps an offline run: bytes of a block, of a record's header, of the file's."""


@pytest.fixture(autouse=True)
def no_open_run():
    """W&B goes on with a run that another test of the process has left open."""
    wandb.finish()
    yield
    wandb.finish()


class StopError(Exception):
    """Stands for a kill."""


def records(path: Path) -> list[Record]:
    data, place, part, found = path.read_bytes(), FIRST_BLOCK, b"", []
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + HEADER])
        part += data[place + HEADER : place + HEADER + length]
        place += HEADER + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(part))
            part = b""
    return found


def whole(path: Path) -> list[Record]:
    """The records of a finished run; its service may still be writing when `wandb.finish` returns."""
    for _ in range(100):
        found = records(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} is not finished")


def history(folder: Path) -> list[dict]:
    """The rows of all offline files of a run, in the order of their times."""
    rows = []
    for file in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        for record in whole(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.mark.parametrize("hook", ["on_train_batch_end", "offer"])
def test_a_resumed_run_repeats_no_step_and_leaves_none_out(hook, tmp_path, monkeypatch):
    """Killed in step 7, whose last checkpoint is of step 6; and in the closing evaluation, when no step was left."""
    real = getattr(RunKeeper, hook)

    def dies(self, first, *rest):
        if (first.global_step if hook == "on_train_batch_end" else first) == (7 if hook == "on_train_batch_end" else 8):
            raise StopError
        return real(self, first, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, hook, dies)
        with pytest.raises(StopError):
            run_small("kmeans_baseline", tmp_path, "w", "logger=wandb")
    wandb.finish()
    before = (tmp_path / "w" / "wandb_id").read_text()
    time.sleep(1.1)  # W&B names the files of a run by the second
    run = run_small("kmeans_baseline", tmp_path, "w", "logger=wandb")
    wandb.finish()
    files = list((run.folder / "wandb").glob("offline-run-*"))
    assert len(files) == 2
    assert {file.name.rpartition("-")[2] for file in files} == {before}
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    expected: dict[int, dict[str, float]] = {}
    for row in rows:
        values = {key: float(value) for key, value in row.items() if value and key != "step"}
        expected.setdefault(int(row["step"]), {}).update(values)
    got = history(run.folder)
    assert [row["_step"] for row in got] == list(expected) == list(range(1, 9))
    for row in got:
        assert row["trainer/global_step"] == row["_step"]
        numbers = {key: value for key, value in row.items() if key.startswith(("train/", "val/"))}
        assert numbers == pytest.approx(expected[row["_step"]], rel=1e-5)
    for key in ("panels", "pictures", "confusion"):
        assert f"{key}.filenames" in got[-1]
        assert not any(f"{key}.filenames" in row for row in got[:-1])
    assert got[-1]["pictures.captions"][0].startswith("val/")
    assert set(got[-1]["pictures.all_masks"][0]) == {"truth", "cluster", "kmeans", "linear"}


def test_an_offline_run_names_its_code_and_holds_no_key(tmp_path, monkeypatch):
    secret = "5ec2e7" * 7
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_small("kmeans_baseline", tmp_path, "w", "logger=wandb")
    wandb.finish()
    found = {}
    for file in (run.folder / "wandb").glob("offline-run-*/*.wandb"):
        for record in whole(file):
            update = record.run.config.update or record.config.update
            found |= {item.key: json.loads(item.value_json) for item in update}
    assert found["code_version"] == (environment.git_commit() or "no checkout")
    assert found["data"]["name"] == "scenes"
    for file in run.folder.rglob("*"):
        assert not file.is_file() or secret.encode() not in file.read_bytes(), file


def test_masks_of_a_picture():
    meta = ClassMeta(names=("a", "b"))
    ids = np.array([[0, 1], [2, 2]])
    row = Row(np.zeros((2, 2, 3), np.uint8), {"cluster": ids, "linear": ids % 2}, np.array([[0, 255], [1, 1]]), "val/1")
    (picture,) = masked_pictures([row], meta, {"cluster": np.array([1, -1, 0])})
    found = {name: np.array(Image.open(mask._path)).tolist() for name, mask in picture._masks.items()}
    assert found == {"truth": [[0, 255], [1, 1]], "cluster": [[1, 254], [0, 0]], "linear": [[0, 1], [0, 0]]}
    (picture,) = masked_pictures([Row(row.image, {"cluster": ids + 253})], ClassMeta(), {})
    assert not picture._masks


def test_rows_between_what_was_handed_over_and_the_checkpoint_are_filled_in(tmp_path, monkeypatch):
    """A kill between a row of metrics.csv and its way to W&B."""
    sent = []
    (tmp_path / "step").write_text("2\n")
    logger = StepLogger(tmp_path / "step", save_dir=tmp_path, offline=True)
    monkeypatch.setattr(
        logger, "_experiment", type("Run", (), {"log": lambda self, row, **how: sent.append(how["step"])})()
    )
    for step in range(1, 5):
        logger.add(step, {"train/loss": "0.5", "val/x": ""})
    logger.add(5, {"train/loss": 0.25})
    assert sent == [3, 4]
    logger.close()
    logger.close()
    assert sent == [3, 4, 5]
    assert (tmp_path / "step").read_text() == "5\n"


def test_two_trainings_of_a_process_are_two_runs(tmp_path):
    ids = [
        (run_small("kmeans_baseline", tmp_path, name, "logger=wandb").folder / "wandb_id").read_text() for name in "ab"
    ]
    assert wandb.run is None
    assert ids[0] != ids[1]
    for name, own in zip("ab", ids, strict=True):
        (folder,) = (tmp_path / name / "wandb").glob("offline-run-*")
        assert folder.name.endswith(own.strip())


def test_the_summary_leads_with_the_headline(tmp_path, monkeypatch):
    monkeypatch.setattr(StepLogger, "experiment", SimpleNamespace(summary={}))
    logger = StepLogger.__new__(StepLogger)
    logger.summarise({"headline": "kmeans", "val/cluster/miou": 11.7, "val/kmeans/miou": 30.6})
    assert StepLogger.experiment.summary == {"headline": 30.6, "headline_key": "val/kmeans/miou"}
    StepLogger.experiment.summary.clear()
    logger.summarise({"headline": "own"})
    assert StepLogger.experiment.summary == {}
