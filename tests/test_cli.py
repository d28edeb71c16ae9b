"""The words of run.py as a user types them: exit codes, one-line errors, and files that come out."""

import json
import logging
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import config
import run
from datamodules.files.opening import ENDINGS
from engine import setup
from evaluation import readout
from lightning_modules import registry
from reporting import panels
from tests.conftest import small_words
from tests.datamodules import trees
from tests.support.words import call, error_line


def test_no_words_shows_the_commands(capsys):
    code, out, _ = call(capsys)
    assert code == 2
    for command in run.COMMANDS:
        assert f"  run.py {command}" in out


def test_every_room_is_heard():
    """Where a command has put its pages is said by the room that wrote them."""
    assert run.main(["version"]) == 0
    rooms = tomllib.loads((Path(run.__file__).parent / "pyproject.toml").read_text())["tool"]["importlinter"][
        "root_packages"
    ]
    assert [room for room in rooms if not logging.getLogger(f"{room}.file").isEnabledFor(logging.INFO)] == []


def test_unknown_command(capsys):
    assert error_line(capsys, "tran") == "error: tran: no such command; did you mean train?"


def test_wrong_words_end_in_one_line_before_anything_is_made(capsys, tmp_path):
    runs = f"run.dir={tmp_path}"
    assert error_line(capsys, "train", runs, "method=hiden_positives").endswith("did you mean hidden_positives?")
    assert error_line(capsys, "train", runs, "trainer.max_step=5").endswith("did you mean trainer.max_steps?")
    assert error_line(capsys, "train", runs, "data=folder") == (
        "error: data.root: data=folder needs a folder of pictures; set data.root=<folder>"
    )
    assert error_line(capsys, "train", runs, "data=folder", f"data.root={tmp_path}/none").startswith(
        "error: data.root="
    )
    assert error_line(capsys, "train", runs, "data.train_size=50", "data.eval_size=50").startswith(
        "error: data.train_size"
    )
    assert error_line(capsys, "train", runs, "trainer.accelerator=gpu", "data.train_count=20") == (
        "error: trainer.accelerator=gpu: no CUDA device is visible; "
        "use trainer.accelerator=auto, or see `run.py doctor`"
    )
    assert not list(tmp_path.iterdir())


def test_a_tilde_is_the_home_folder_wherever_a_path_stands(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    line = error_line(capsys, "predict", "ckpt=~/x.ckpt", "input=~/my pictures", "output=~/o")
    assert line.startswith(f"error: ckpt={tmp_path}/x.ckpt")
    line = error_line(capsys, "train", "data=folder", "data.root=~/none", f"run.dir={tmp_path}/runs")
    assert line.startswith(f"error: data.root={tmp_path}/none")


def test_paths_with_spaces_go_through_make():
    words = ["CKPT=a b.ckpt", "INPUT=/my pictures", "OUTPUT=/out put", 'ARGS="names=my names.yaml"']
    make = ["make", "--no-print-directory", "-n", "PY=python", "predict", *words]
    shown = subprocess.run(make, cwd=Path(run.__file__).parent, capture_output=True, text=True, check=True).stdout
    assert shlex.split(shown)[2:] == [
        "predict", "ckpt=a b.ckpt", "input=/my pictures", "output=/out put", "names=my names.yaml",
    ]  # fmt: skip


def test_eval_and_predict_want_their_words(capsys, tmp_path):
    assert error_line(capsys, "eval") == "error: ckpt: is needed; write ckpt=… (CKPT=… of make)"
    assert (
        error_line(capsys, "predict", "ckpt=x", "input=y")
        == "error: output: is needed; write output=… (OUTPUT=… of make)"
    )
    assert error_line(capsys, "eval", f"ckpt={tmp_path}/x.ckpt") == (
        f"error: ckpt={tmp_path}/x.ckpt: no such file; a run keeps its own under checkpoints/last.ckpt and best.ckpt"
    )


def test_list_names_everything(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0
    for group in ("method", "data", "backbone", "trainer"):
        for name in config.names(group):
            assert name in out


def test_show_config_prints_what_a_run_would_use(capsys):
    code, out, _ = call(capsys, "show-config", "method=hidden_positives", "seed=9")
    assert code == 0
    assert "seed: 9" in out
    assert "temperature:" in out


def test_hidden_positives_settings_are_checked(capsys, tmp_path):
    words = small_words("hidden_positives", f"run.dir={tmp_path}")
    assert error_line(capsys, "train", *words, "method.lhp.attention=attn") == (
        "error: method.lhp.attention=attn: not one of auto, backbone, affinity"
    )
    assert error_line(capsys, "train", *words, "method.denominator=all") == (
        "error: method.denominator=all: not one of agnostic, positives"
    )
    assert error_line(capsys, "train", *words, "method.temperature=0").endswith("must be at least 0.02")
    assert error_line(capsys, "train", *words, "method.rho=2").endswith("expected a number from 0 to 1")


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory) -> Path:
    """A folder as people have it: odd sizes, 16 bit, grey, alpha, sub-folders, one stem twice, one broken file."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 255, (37, 61, 3), dtype=np.uint8)
    (root / "sub dir").mkdir()
    Image.fromarray(rgb).save(root / "a.jpg")
    Image.fromarray(rgb).save(root / "a.png")
    Image.fromarray(rgb[:, :, 0].astype(np.uint16) * 257).save(root / "sub dir" / "sixteen.tif")
    Image.fromarray(np.dstack([rgb, rgb[:, :, 0]])).save(root / "sub dir" / "Alpha.PNG")
    Image.fromarray(rng.integers(0, 255, (90, 40), dtype=np.uint8)).save(root / "grey.bmp")
    (root / "broken.jpg").write_bytes((root / "a.jpg").read_bytes()[:200])
    return root


@pytest.mark.train
def test_predict_keeps_names_and_sizes(capsys, small_run, odd_pictures, tmp_path):
    checkpoint = small_run("hidden_positives").folder / "checkpoints" / "last.ckpt"
    output = tmp_path / "out"
    code, _, err = call(capsys, "predict", f"ckpt={checkpoint}", f"input={odd_pictures}", f"output={output}")
    assert code == 0, err
    wanted = {
        "a.jpg": (61, 37),
        "a.png": (61, 37),
        "sub dir/sixteen": (61, 37),
        "sub dir/Alpha": (61, 37),
        "grey": (40, 90),
    }
    for name, size in wanted.items():
        index = Image.open(output / "index" / f"{name}.png")
        assert index.size == size
        assert Image.open(output / "overlay" / f"{name}.png").size == size
        assert np.asarray(index).max() < 12
    content = json.loads((output / "clusters.json").read_text())
    assert content["pictures"] == 5
    assert [Path(file).name for file in content["unreadable"]] == ["broken.jpg"]
    assert (output / "legend.png").is_file()
    assert content["probe"] == "kmeans"


@pytest.mark.train
def test_predict_gives_the_ids_of_validation(small_run, tmp_path):
    """On a picture of the evaluation's own size, ids are those that the evaluation saw."""
    import torch

    from engine import setup
    from evaluation import readout
    from inference import predicting

    fitted = small_run("hidden_positives")
    cfg = config.restore(fitted.checkpoint["labelfree"]["config"])
    cfg, data = setup.build_data(cfg)
    model = setup.restore_model(fitted.checkpoint, cfg)
    batch = next(iter(data.val_dataloader()))
    with torch.inference_mode():
        scores = model.read(batch["image"])[1]["kmeans"]
        expected = readout.predict(scores, batch["image"].shape[-2:])[0].numpy()
    image = (batch["image"][0] * 255).round().byte().permute(1, 2, 0).numpy()
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in" / "x.png")
    predicting.predict(fitted.folder / "checkpoints" / "last.ckpt", tmp_path / "in", tmp_path / "out", [])
    found = np.asarray(Image.open(tmp_path / "out" / "index" / "x.png"))
    assert (found == expected).mean() > 0.999


@pytest.mark.train
def test_predict_errors(capsys, small_run, tmp_path):
    checkpoint = small_run("hidden_positives").folder / "checkpoints" / "last.ckpt"
    (tmp_path / "empty").mkdir()
    line = error_line(capsys, "predict", f"ckpt={checkpoint}", f"input={tmp_path}/empty", f"output={tmp_path}/o")
    assert line == (
        f"error: input: no pictures found in {tmp_path}/empty (any depth); looked for files ending in "
        f"{', '.join(ENDINGS)}, in small or capital letters"
    )
    line = error_line(capsys, "predict", f"ckpt={checkpoint}", f"input={tmp_path}/no", f"output={tmp_path}/o")
    assert line == f"error: input={tmp_path}/no: there is no such folder"


@pytest.mark.train
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name == "cocostuff171" else []) for name in trees.TREES],
)  # drawing confusion.png of 171 classes takes seconds
def test_every_published_set_trains(capsys, tmp_path, name):
    """One step on a made-up official tree, decoded once, to the end of the run."""
    trees.TREES[name](tmp_path / "data")
    kept = [word for word in small_words("kmeans_baseline", f"run.dir={tmp_path}", "run.name=x") if word[:5] != "data."]
    kept = [word for word in kept if word != "data=scenes"]
    words = [f"data={name}", f"data.root={tmp_path}/data", "data.workers=0"]
    size = 64 if name in ("cocostuff171", "coco81") else 32  # k-means wants a patch a cluster
    words += [f"data.train_size={size}", f"data.eval_size={size}"]
    words += ["data.batch_size=2", "data.cache=disk", f"cache.dir={tmp_path}/cache", "trainer.max_steps=1"]
    code, _, err = call(capsys, "train", *kept, *words)
    assert code == 0, err
    metrics = json.loads((tmp_path / "x" / "metrics.json").read_text())
    assert metrics["val/kmeans/miou"] is not None
    assert metrics["protocol/list"].startswith(
        "val: 2 pictures" if name not in ("cocostuff171", "coco81") else "val: 3"
    )


@pytest.mark.train
def test_data_without_labels_runs_to_the_end(capsys, caplog, tmp_path):
    """A flat folder of a few pictures: label-free scores, panels, no accuracy, and null is nowhere NaN."""
    rng = np.random.default_rng(1)
    (tmp_path / "pictures").mkdir()
    for i in range(12):
        picture = rng.integers(0, 255, (64, 80, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "pictures" / f"{i}.png")
    words = [
        "data=folder",
        f"data.root={tmp_path}/pictures",
        "data.train_size=48",
        "data.eval_size=48",
        "data.batch_size=4",
    ]
    more = [
        word
        for word in small_words("hidden_positives", f"run.dir={tmp_path}", "run.name=u")
        if not word.startswith("data")
    ]
    code, out, err = call(capsys, "train", *more, *words, "trainer.max_steps=3")
    assert code == 0, err
    assert "its bundled weights know drawn scenes alone" in caplog.text
    text = (tmp_path / "u" / "metrics.json").read_text()
    assert "NaN" not in text
    metrics = json.loads(text)
    assert metrics["val/cluster/entropy"] >= 0
    assert metrics["val/kmeans/entropy"] == pytest.approx(expected_entropy(tmp_path / "u"), abs=1e-3)
    assert metrics["best/kmeans/confidence"] == metrics["val/kmeans/confidence"] > 0
    assert re.search(rf"kmeans +│ +{metrics['val/kmeans/entropy']:.1f} │ +{metrics['val/kmeans/confidence']:.1f}", out)
    assert "best entropy" not in out  # the last step is the best by rule
    assert "matching" not in out
    assert "they show a collapse and rank nothing" in " ".join(out.split())
    assert not any(key.endswith(("acc", "miou")) for key in metrics)
    assert metrics["selection/rule"] == "last step"
    assert metrics["selection/uses_labels"] is False
    sheet = Image.open(tmp_path / "u" / "panels" / "sheet.png")
    assert sheet.width == 4 * (320 + panels.GAP) + panels.GAP  # picture, cluster, kmeans, confidence; no errors
    assert panels.WRONG not in {colour for _, colour in sheet.getcolors(1 << 24)}
    code, _, err = call(capsys, "eval", f"ckpt={tmp_path}/u/checkpoints/last.ckpt")
    assert code == 0, err
    again = json.loads((tmp_path / "u" / "eval" / "last" / "metrics.json").read_text())
    assert {key: value for key, value in again.items() if key.startswith("val/")} == {
        key: value for key, value in metrics.items() if key.startswith("val/")
    }
    code, _, err = call(capsys, "compare", f"runs={tmp_path}/u", f"run.dir={tmp_path}", "name=c")
    assert code == 0, err
    table = (tmp_path / "compare" / "c" / "table.md").read_text()
    assert "| cluster entropy | cluster confidence | kmeans entropy | kmeans confidence |" in table


def expected_entropy(folder: Path) -> float:
    """Entropy of the k-means clusters of a run's evaluated pictures, in percent, computed from its checkpoint."""
    checkpoint = setup.read_checkpoint(folder / "checkpoints" / "last.ckpt")
    cfg, data = setup.build_data(config.restore(checkpoint["labelfree"]["config"]))
    model = setup.restore_model(checkpoint, cfg)
    data.pad_multiple = model.pad_multiple
    wins = np.zeros(cfg.method.num_clusters)
    for batch in data.loader("val", geometry="eval"):
        with torch.inference_mode():
            cosines = model.read(batch["image"])[1]["kmeans"]
        inside = readout.valid_patches(batch["valid"], cosines.shape[-2:])
        wins += np.bincount(cosines.argmax(1)[inside].numpy(), minlength=len(wins))
    share = wins[wins > 0] / wins.sum()
    return float(-100 * (share * np.log(share)).sum() / np.log(len(wins)))


@pytest.mark.train
def test_a_model_trained_without_labels_is_evaluated_on_labelled_pictures(capsys, tmp_path):
    """And the other way round: no accuracy is made up where there are no labels."""
    rng = np.random.default_rng(2)
    for name in (
        "plain",
        "labelled/images/train",
        "labelled/images/val",
        "labelled/labels/train",
        "labelled/labels/val",
    ):
        (tmp_path / name).mkdir(parents=True)
    for i in range(8):
        picture = Image.fromarray(rng.integers(0, 255, (48, 48, 3), dtype=np.uint8))
        label = Image.fromarray(np.tile(np.arange(48) // 24, (48, 1)).astype(np.uint8))
        picture.save(tmp_path / "plain" / f"{i}.png")
        for split in ("train", "val"):
            picture.save(tmp_path / "labelled" / "images" / split / f"{i}.png")
            label.save(tmp_path / "labelled" / "labels" / split / f"{i}.png")
    (tmp_path / "labelled" / "classes.json").write_text('["left", "right"]')
    kept = [word for word in small_words("kmeans_baseline", f"run.dir={tmp_path}/runs") if not word.startswith("data")]
    words = [
        *kept,
        "data=folder",
        "data.train_size=48",
        "data.eval_size=48",
        "data.batch_size=4",
        "trainer.max_steps=2",
    ]
    for root, other in (("plain", "labelled"), ("labelled", "plain")):
        more = ["method.num_clusters=2", f"data.root={tmp_path}/{root}", f"run.name={root}"]
        code, _, err = call(capsys, "train", *words, *more)
        assert code == 0, err
        checkpoint = tmp_path / "runs" / root / "checkpoints" / "last.ckpt"
        code, _, err = call(capsys, "eval", f"ckpt={checkpoint}", f"data.root={tmp_path}/{other}")
        assert code == 0, err
        metrics = json.loads((tmp_path / "runs" / root / "eval" / "last" / "metrics.json").read_text())
        assert ("val/kmeans/miou" in metrics) == (other == "labelled")
        assert "val/linear/miou" not in metrics
        assert metrics["val/cluster/entropy"] is not None


def test_registry_refuses_a_file_with_two_methods(monkeypatch):
    from lightning_modules import kmeans_baseline

    class Second(kmeans_baseline.KMeansBaseline):
        """Another."""

    Second.__module__ = kmeans_baseline.__name__
    monkeypatch.setattr(kmeans_baseline, "Second", Second, raising=False)
    with pytest.raises(run.ConfigError, match="must define exactly one UnsupervisedSegmenter, found 2"):
        registry.method_class("kmeans_baseline")


@pytest.mark.train
def test_eval_at_several_resolutions_prints_one_table(capsys, small_run):
    checkpoint = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    code, out, err = call(capsys, "eval", f"ckpt={checkpoint}", "evaluation.resolutions=[48,64]")
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    assert [row[:2] for row in rows] == [
        [size, probe] for size in ("48", "64") for probe in ("kmeans", "cluster", "linear")
    ]


def test_a_path_that_the_system_refuses_is_named(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert error_line(capsys, "train", f"run.dir={tmp_path}/file", "run.name=x") == (
        f"error: {tmp_path}/file/x: not a directory; name another place, or change its rights"
    )


def test_levels_are_not_written_into_the_pictures(capsys, tmp_path):
    (tmp_path / "x.ckpt").touch()
    words = ("predict", f"ckpt={tmp_path}/x.ckpt", f"input={tmp_path}", f"output={tmp_path}/out", "levels=all")
    assert error_line(capsys, *words) == (
        f"error: output={tmp_path}/out: lies in the input folder and would be read as pictures; name another"
    )
