"""`run.py data`: what to fetch, and what of it is there."""

import pytest

import config
from datamodules.base.module import load_datamodule
from datamodules.base.official import OfficialDataModule
from tests.datamodules import trees
from tests.support.words import call, error_line


def test_data_without_a_name_lists_the_sets(capsys):
    code, out, _ = call(capsys, "data")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == config.names("data")
    assert error_line(capsys, "data", "root=x") == (
        "error: root=x: name the data set first, as in run.py data name=cocostuff27 root=<folder>"
    )
    assert error_line(capsys, "data", "name=camvidd").endswith("did you mean camvid?")
    assert error_line(capsys, "data", "name=camvid", "rebuild=1") == "error: rebuild=1: expected true or false"


@pytest.mark.parametrize("name", config.names("data"))
def test_data_says_what_to_fetch(capsys, name):
    code, out, _ = call(capsys, "data", f"name={name}")
    assert out.startswith(f"{name}: ")
    if not issubclass(load_datamodule(name), OfficialDataModule):
        assert code == {"folder": 2, "scenes": 0}.get(name, code)
        return
    assert code == 0
    assert out.splitlines()[-1] == f"nothing was checked; `run.py data name={name} root=<folder>` checks a folder"
    for word in ("home     http", "terms    ", "fetch    ", "expects  "):
        assert f"\n{word}" in out


def test_data_checks_a_folder(capsys, tmp_path, monkeypatch):
    trees.camvid(tmp_path)
    words = ("data", "name=camvid", f"root={tmp_path}")
    assert (
        error_line(capsys, *words)
        == f"error: data.root={tmp_path}: 6 of 6 checks failed; what to do stands behind each"
    )
    monkeypatch.setattr("datamodules.camvid.COUNTS", {"train": 4, "val": 2, "test": 3})
    code, out, _ = call(capsys, *words)
    assert code == 0
    assert out.splitlines()[-7:] == [
        f"checking {tmp_path}",
        "ok       train: 4 pictures of train",
        "ok       trainannot: 4 labels of train",
        "ok       val: 2 pictures of val",
        "ok       valannot: 2 labels of val",
        "ok       split train: 4 pictures",
        "ok       split val: 2 pictures",
    ]
    assert call(capsys, *words, "eval_split=test")[0] == 0
    (tmp_path / "testannot" / "test_00001.png").unlink()
    code, out, _ = call(capsys, *words, "eval_split=test")
    assert code == 2
    assert (
        "missing  testannot: 2 of 3 labels of test -> get the folder CamVid of the SegNet tutorial; it belongs into "
        "testannot\n"
    ) in out


@pytest.mark.parametrize(
    ("name", "builder", "words", "failed"),
    [
        ("cityscapes27", trees.cityscapes, (), {"train", "val"}),
        ("potsdam3", trees.potsdam, (), {"train", "val"}),
        ("pascal_voc", trees.voc, (), {"train", "val"}),
        ("kitti", trees.kitti_step, (), {"train", "val"}),
        ("kitti", trees.kitti_semantics, ("release=semantics",), set()),
        ("cocostuff171", trees.coco, (), {"train", "val"}),
        ("coco81", trees.coco, (), {"train", "val"}),
        ("coco_instances", trees.coco_instances, (), {"train", "val"}),
    ],
)
def test_data_of_an_incomplete_download(capsys, tmp_path, name, builder, words, failed):
    builder(tmp_path)
    code, out, err = call(capsys, "data", f"name={name}", f"root={tmp_path}", *words)
    assert code == 2
    assert "checks failed; what to do stands behind each" in err
    lines = out.splitlines()
    assert {
        split for split in ("train", "val") if any(line.startswith(f"missing  split {split}") for line in lines)
    } == (failed)
    assert all(" -> " in line for line in lines if line.startswith("missing "))
