"""Tables, lists and the rule of the _7 lists; with the real lists where they are at hand."""

import shutil

import numpy as np
import pytest

import config as configuration
from datamodules.base import coco_files
from datamodules.cocostuff27 import coarse_map
from datamodules.inventory import examine
from tests.datamodules import trees
from tests.datamodules.pictures import save

REAL = {"coarse": "cocostuff27_coarse", "curated7": "cocostuff27_curated7"}


def test_the_table_is_whole():
    table = coco_files.fine_to_coarse()
    assert sorted(table) == list(range(182))
    assert set(table.values()) == set(range(27))
    assert len(coco_files.FINE_NAMES) == 182
    assert len(set(coco_files.COARSE_NAMES)) == 27
    assert len(coco_files.used_fine()) == 171


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [
        ("person", "person"), ("boat", "vehicle"), ("traffic light", "outdoor"), ("giraffe", "animal"),
        ("backpack", "accessory"), ("tennis racket", "sports"), ("bowl", "kitchen"), ("cake", "food-thing"),
        ("toilet", "furniture-thing"), ("cell phone", "electronic"), ("refrigerator", "appliance"),
        ("book", "indoor"), ("ceiling-tile", "ceiling"), ("carpet", "floor"), ("salad", "food-stuff"),
        ("shelf", "furniture-stuff"), ("metal", "raw-material"), ("towel", "textile"), ("wall-brick", "wall"),
        ("window-blind", "window"), ("skyscraper", "building"), ("road", "ground"), ("tree", "plant"),
        ("clouds", "sky"), ("wood", "solid"), ("fence", "structural"), ("sea", "water"),
    ],
)  # fmt: skip
def test_names_and_table_mean_the_same(fine, coarse):
    value = coco_files.FINE_NAMES.index(fine)
    assert coco_files.COARSE_NAMES[coco_files.fine_to_coarse()[value]] == coarse


def test_no_fine_id_becomes_class_zero_by_default():
    every = np.arange(256, dtype=np.uint8)[None]
    for classes in (27, 15, 3):
        label, foreign = coarse_map(classes)(every)
        assert sorted(foreign) == list(range(182, 255))
        assert (label[0, 182:] == 255).all()


@pytest.mark.parametrize(
    ("height", "width", "stuff", "listed"),
    [(360, 360, 0.75, True), (359, 500, 1.0, False), (500, 359, 1.0, False), (360, 400, 0.7475, False)],
)
def test_the_rule(height, width, stuff, listed):
    """Sky and unlabelled pixels: exactly three quarters of all pixels are enough."""
    label = np.full((height, width), 255, np.uint8)
    label[:, : round(width * stuff)] = 156
    label[:, 0] = 156
    assert coco_files.meets_rule(label) == listed
    things = np.where(label == 156, np.uint8(0), label)
    assert not coco_files.meets_rule(things)


@pytest.fixture
def large(tmp_path):
    """A tree whose labels are large enough for the rule: the first and fourth of val2017 meet it, all of train2017."""
    trees.coco(tmp_path)
    for split, thing in (("train2017", ()), ("val2017", (2, 3))):
        for path in sorted((tmp_path / "annotations" / split).glob("*.png")):
            value = 0 if int(path.stem) in thing else 156
            save(path, np.full((360, 380), value, np.uint8))
    return tmp_path


def lines_of(root, *words, rebuild=False) -> tuple[list[str], str]:
    cfg = configuration.compose(["data=cocostuff27", f"data.root={root}", *words])
    found = []
    error = ""
    try:
        for line in examine(cfg, rebuild):
            found.append(line.replace(str(root), "ROOT"))
    except ValueError as raised:
        error = str(raised).replace(str(root), "ROOT")
    return found, error


def test_the_lists_are_rebuilt_from_the_labels(large):
    for split in coco_files.PUBLISHED:
        (large / "curated" / split / "Coco164kFull_Stuff_Coarse_7.txt").unlink()
    lines, _ = lines_of(large, rebuild=True)
    what = "rule of Coco164kFull_Stuff_Coarse_7.txt on val2017"
    path = "ROOT/curated/val2017/Coco164kFull_Stuff_Coarse_7.txt"
    assert f"ok       {what}: 2 ids of 3 labels, written to {path}" in lines
    assert coco_files.read_list(large / path.removeprefix("ROOT/")) == ["000000000001", "000000000004"]
    lines, _ = lines_of(large, rebuild=True)
    assert f"ok       {what}: 2 ids of 3 labels, equal to the list there" in lines
    (large / "curated" / "val2017" / "Coco164kFull_Stuff_Coarse_7.txt").write_text("000000000002\n")
    lines, _ = lines_of(large, rebuild=True)
    assert (
        f"missing  {what}: 2 ids of 3 labels, not those of the list there -> label files are missing or changed, or "
        "the list is another one; remove the wrong one"
    ) in lines


def test_what_is_missing_is_named(tmp_path):
    trees.coco(tmp_path)
    shutil.rmtree(tmp_path / "annotations" / "train2017")
    (tmp_path / "curated" / "val2017" / "Coco164kFull_Stuff_Coarse_7.txt").unlink()
    lines, error = lines_of(tmp_path)
    assert lines[1:] == [
        "missing  images/train2017: 6 of 118,287 pictures of train2017 -> get train2017.zip of COCO; it belongs into "
        "images/train2017",
        "missing  annotations/train2017: 0 of 118,287 labels of train2017 -> get stuffthingmaps_trainval2017.zip of "
        "COCO-Stuff; it belongs into annotations/train2017",
        "missing  images/val2017: 4 of 5,000 pictures of val2017 -> get val2017.zip of COCO; it belongs into "
        "images/val2017",
        "missing  annotations/val2017: 3 of 5,000 labels of val2017 -> get stuffthingmaps_trainval2017.zip of "
        "COCO-Stuff; it belongs into annotations/val2017",
        *(
            f"missing  curated/{split}/{name}.txt: {have} of {want} ids -> get the folder `curated` of "
            "github.com/janghyuncho/PiCIE again"
            for split, name, have, want in (
                ("train2017", "Coco164kFull_Stuff_Coarse", 5, "97,702"),
                ("val2017", "Coco164kFull_Stuff_Coarse", 3, "4,172"),
                ("train2017", "Coco164kFull_Stuff_Coarse_7", 2, "49,629"),
            )
        ),
        "missing  curated/val2017/Coco164kFull_Stuff_Coarse_7.txt: absent -> `run.py data name=cocostuff27 root=ROOT "
        "rebuild=true` makes it from the labels",
        "missing  curated/train2017/Coco164kFew_Stuff_6.txt: 1 of 35,228 ids -> get the folder `curated` of "
        "github.com/janghyuncho/PiCIE again",
        "missing  curated/val2017/Coco164kFew_Stuff_6.txt: 1 of 1,432 ids -> get the folder `curated` of "
        "github.com/janghyuncho/PiCIE again",
        "missing  split train: cannot be put together -> data.root=ROOT: holds no annotations/train2017 (labels of "
        "train2017, *.png); `run.py data name=cocostuff27` says what to fetch and where it belongs",
        "missing  split val: cannot be put together -> data.eval_list=curated7: there is no file "
        "ROOT/curated/val2017/Coco164kFull_Stuff_Coarse_7.txt; `run.py data name=cocostuff27 root=ROOT rebuild=true` "
        "makes it from the labels",
    ]
    assert error == "data.root=ROOT: 12 of 12 checks failed; what to do stands behind each"


def test_a_list_of_the_right_length_and_other_ids(tmp_path):
    path = tmp_path / "list.txt"
    coco_files.write_list(path, [f"{i:012d}" for i in range(2175)])
    check = coco_files.check_list(path, "curated7", "val2017")
    assert not check.ok
    assert check.found.startswith("2,175 ids, but with the md5 ")
    assert check.found.endswith(" instead of de66cfb97c6ea796c3ba8e001edda199")


def test_a_complete_tree_is_all_ok(large, monkeypatch):
    monkeypatch.setattr(coco_files, "PUBLISHED", {"train2017": 6, "val2017": 4})
    for split in coco_files.PUBLISHED:
        names = [path.stem for path in sorted((large / "images" / split).glob("0*"))]
        for name in names:
            save(large / "annotations" / split / f"{name}.png", np.full((360, 380), 156, np.uint8))
        for stem in coco_files.LISTS.values():
            coco_files.write_list(large / "curated" / split / f"{stem}.txt", names)
    counts = {key: {"train2017": 6, "val2017": 4} for key in [*coco_files.LISTS, "full"]}
    monkeypatch.setattr(coco_files, "COUNTS", counts)
    monkeypatch.setattr(coco_files, "CHECKSUMS", {})
    lines, error = lines_of(large, rebuild=True)
    assert error == ""
    assert len(lines) == 15
    assert all(line.startswith(("ok ", "checking ")) for line in lines)


@pytest.mark.realdata
def test_the_real_lists(pictures):
    folder = pictures / "lists"
    for name, stem in REAL.items():
        for split in coco_files.PUBLISHED:
            check = coco_files.check_list(folder / f"{stem}_{split}.txt", name, split)
            assert check.ok, check
            checked = (name, split) in coco_files.CHECKSUMS
            assert check.found == f"{coco_files.COUNTS[name][split]:,} ids{', checksum right' * checked}"
    for split in coco_files.PUBLISHED:
        few, all_of_them = (
            set(coco_files.read_list(folder / f"{REAL[name]}_{split}.txt")) for name in ("curated7", "coarse")
        )
        assert few < all_of_them
