"""Whole runs on folders as people have them: what is scored, what is said, and what the run remembers."""

import json
import logging
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import run
from common.files import write_text
from tests.conftest import small_words

pytestmark = pytest.mark.train


def half(low: int = 0, high: int = 1) -> np.ndarray:
    return np.where(np.tile(np.arange(48) // 24, (48, 1)), high, low).astype(np.uint8)


def folder(root, labels: dict[str, np.ndarray | None], names=("left", "right"), picture=None):
    """Four pictures a split, with a label each where there is one; the words of a short run on them."""
    rng = np.random.default_rng(0)
    for split, label in labels.items():
        for i in range(4):
            image = rng.integers(0, 90, (48, 48, 3), dtype=np.uint8) + 120 * half()[..., None]
            path = root / "images" / split / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image if picture is None else picture(image)).save(path)
            if label is not None:
                (root / "labels" / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(label).save(root / "labels" / split / f"{i}.png")
    if names:
        write_text(root / "classes.json", json.dumps(list(names)))
    small = [word for word in small_words("kmeans_baseline") if not word.startswith("data")]
    sizes = ["data=folder", f"data.root={root}", "data.train_size=48", "data.eval_size=48", "data.batch_size=2"]
    return [*small, *sizes, f"run.dir={root}/runs", "run.name=x", "trainer.max_steps=2", "trainer.val_every=1"]


def trained(capsys, words, *more) -> tuple[dict, str]:
    """metrics.json of a run, and what it printed: the root logger has no handler yet, as in a new process."""
    with mock.patch.object(logging.getLogger(), "handlers", []):
        code = run.main(["train", *words, *more])
    out, err = capsys.readouterr()
    assert code == 0, err
    root = next(word.split("=")[1] for word in words if word.startswith("run.dir="))
    with open(f"{root}/x/metrics.json") as file:
        return json.load(file), out + err


@pytest.mark.parametrize("label", [None, half(255, 255)], ids=["none", "ignored"])
def test_labels_choose_nothing_where_none_is_validated(capsys, tmp_path, label):
    words = folder(tmp_path, {"train": half(), "val": label})
    metrics, said = trained(capsys, words, "evaluation.select=val/cluster/miou")
    assert metrics["selection/rule"] == "last step"
    assert metrics["selection/uses_labels"] is False
    assert metrics["best/step"] == 2
    assert "chosen with labels" not in said
    assert metrics["val/cluster/entropy"] is not None


def test_one_class_gives_no_score(capsys, tmp_path):
    words = folder(tmp_path, {"train": half(), "val": half(1, 1)})
    metrics, said = trained(capsys, words, "evaluation.select=val/cluster/miou")
    assert metrics["val/kmeans/acc"] is None
    assert metrics["val/kmeans/miou"] is None
    assert metrics["val/linear/acc"] is None
    assert metrics["selection/rule"] == "last step"
    rows = (tmp_path / "runs" / "x" / "classes.csv").read_text().splitlines()
    assert rows[2].startswith("1,right,")
    assert set(rows[2].split(",")[3:]) == {""}
    assert "'val': no labelled pixel of class left in the 4 labels, which hold the values 1" in said
    assert "'val': all labelled pixels are of one class, right: no accuracy or mIoU can be given" in said


def test_masks_of_0_and_255_from_the_command_line(capsys, tmp_path):
    words = folder(tmp_path, {"train": half(0, 255), "val": half(0, 255)})
    assert run.main(["train", *words]) == 2
    message = capsys.readouterr().err
    assert "set data.label_values='{0: 0, 255: 1}'" in message
    assert not (tmp_path / "runs").exists()
    metrics, _ = trained(capsys, words, "data.label_values={0: 0, 255: 1}", "method.features=colour")
    assert metrics["val/kmeans/miou"] > 90


def test_the_range_of_values_is_settled_in_training_and_kept(capsys, tmp_path):
    """Pictures of 12 bits: without a range a line says so; `auto` becomes numbers, which predict and eval read with."""

    def twelve(image):
        return image[..., 0].astype(np.uint16) * 8 + 900

    words = folder(tmp_path, {"train": half(), "val": half()}, picture=twelve)
    plain, said = trained(capsys, words, "method.features=colour")
    assert "set data.value_range=[0,4095] (what becomes 0 and 255), or data.value_range=auto" in said
    metrics, said = trained(capsys, words, "method.features=colour", "data.value_range=auto", "run.overwrite=true")
    assert "values of more than 8 bits" not in said
    settings = yaml.safe_load((tmp_path / "runs" / "x" / "config.yaml").read_text())
    low, high = settings["data"]["value_range"]
    assert 890 < low < 1000 < 2300 < high < 2700
    checkpoint = tmp_path / "runs" / "x" / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)["labelfree"]["config"]["data"]["value_range"]
    assert stored == [low, high]
    assert run.main(["eval", f"ckpt={checkpoint}"]) == 0
    again = json.loads((tmp_path / "runs" / "x" / "eval" / "last" / "metrics.json").read_text())
    assert again["val/kmeans/miou"] == metrics["val/kmeans/miou"] > plain["val/kmeans/miou"] - 1
    out = tmp_path / "out"
    assert run.main(["predict", f"ckpt={checkpoint}", f"input={tmp_path}/images/val", f"output={out}"]) == 0
    assert np.asarray(Image.open(out / "overlay" / "0.png")).std() > 20
    capsys.readouterr()
    wrong = ["predict", f"ckpt={checkpoint}", f"input={tmp_path}/images/val", f"output={out}2", "data.value_range=auto"]
    assert run.main(wrong) == 2
    assert "error: data.value_range=auto: " in capsys.readouterr().err
    trained(capsys, words, "method.features=colour", "data.value_range=auto")  # finished: the same settings again
