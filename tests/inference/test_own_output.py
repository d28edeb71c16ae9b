"""What a command writes is never read as pictures by the next one."""

from pathlib import Path

import numpy as np
import pytest

import run
from common.errors import ConfigError
from datamodules.folder import expect_apart, pictures_below
from engine.training import panel_names
from launch.compare import Comparison
from tests.conftest import small_words
from tests.datamodules.pictures import noise, save


@pytest.fixture
def flat(tmp_path) -> Path:
    for number in range(6):
        save(tmp_path / "flat" / f"{number}.png", noise(48, 64, seed=number))
    return tmp_path / "flat"


def words(flat: Path, method: str, *more: str) -> list[str]:
    return small_words(method, "data=folder", f"data.root={flat}", "method.num_clusters=3", "data.batch_size=2", *more)


def refused(capsys, *argv: str) -> str:
    assert run.main(list(argv)) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_inside_its_pictures_is_refused(flat, capsys):
    assert refused(capsys, "train", *words(flat, "kmeans_baseline", f"run.dir={flat}/runs")) == (
        f"error: run.dir={flat}/runs: lies in data.root={flat} and would be read as pictures; name another folder"
    )
    line = refused(
        capsys, "train", *words(flat, "kmeans_baseline", f"run.dir={flat.parent}", f"cache.dir={flat}/cache")
    )
    assert line.startswith(f"error: cache.dir={flat}/cache: lies in data.root={flat} ")
    assert not (flat / "runs").exists()


def test_pseudo_labels_inside_their_pictures_are_refused(flat, capsys):
    line = refused(capsys, "pseudo", *words(flat, "normalized_cut"), f"output={flat}/x", f"cache.dir={flat.parent}/c")
    assert line.startswith(f"error: output={flat}/x: lies in data.root={flat} ")


def test_comparisons_inside_their_pictures_are_refused(flat):
    with pytest.raises(ConfigError, match=f"^run.dir={flat}/runs: lies in data.root={flat} "):
        Comparison({"methods": "kmeans_baseline", "data": "folder", "data.root": str(flat), "run.dir": f"{flat}/runs"})


def test_explanations_and_galleries_inside_the_pictures_are_refused(flat, tmp_path, capsys):
    assert run.main(["train", *words(flat, "kmeans_baseline", f"run.dir={tmp_path}/runs", "run.name=a")]) == 0
    found = [f"ckpt={tmp_path}/runs/a/checkpoints/last.ckpt", f"image={flat}/0.png", f"output={flat}/o"]
    capsys.readouterr()
    assert refused(capsys, "explain", *found, "point=1,1").startswith(f"error: output={flat}/o: lies in data.root=")
    assert refused(capsys, "retrieve", *found).startswith(f"error: output={flat}/o: lies in data.root=")
    out = tmp_path / "out"
    assert run.main(["predict", found[0], f"input={flat}", f"output={out}"]) == 0
    (tmp_path / "runs").rename(flat / "runs")  # what is moved there by hand is told by its files
    out.rename(flat / "out")
    assert len(pictures_below(flat)) == 6


def test_folders_that_are_not_looked_at_may_take_output(flat, tmp_path):
    class Data(dict):
        __getattr__ = dict.__getitem__

    def cfg(root):
        return Data(data=Data(name="folder", root=str(root), train_roots=None, images="auto", labels="auto"))

    save(tmp_path / "split" / "images" / "train" / "a.png", np.zeros((8, 8, 3), np.uint8))
    expect_apart(cfg(tmp_path / "split"), output=tmp_path / "split" / "out")
    expect_apart(cfg(flat), output=flat / ".cache" / "x")
    expect_apart(cfg(flat), output=None)
    with pytest.raises(ConfigError, match=r"^output=.*: lies in data.root="):
        expect_apart(cfg(tmp_path / "split"), output=tmp_path / "split" / "images" / "train" / "out")


def test_panels_of_a_run_have_names_of_their_own():
    found = panel_names(["a/b", "a_b", "sheet", "c", "/".join(["x" * 200] * 2)])
    assert len(set(found)) == 5
    assert found[3] == "c.png"
    assert not {"sheet.png", "pseudo_labels.png"} & set(found)
    assert max(map(len, found)) <= 255 - len(".png.1234567")
