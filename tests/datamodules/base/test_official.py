"""Every published data set out of a made-up official tree: splits, label values, names, errors to the letter."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

import config as configuration
from common.errors import ConfigError, DataError
from common.spec import IGNORE
from datamodules.base import coco_files
from datamodules.base.module import load_datamodule
from datamodules.base.official import OfficialDataModule
from datamodules.facts import available
from tests.datamodules import trees
from tests.datamodules.pictures import noise, save

OFFICIAL = [name for name in available() if issubclass(load_datamodule(name), OfficialDataModule)]
SMALL = ["data.batch_size=2", "data.eval_batch_size=2", "data.workers=0", "data.train_size=16", "data.eval_size=16"]
CLASSES = {
    "cocostuff27": 27, "cocostuff171": 171, "coco81": 81, "cityscapes27": 27, "potsdam3": 3, "pascal_voc": 21,
    "kitti": 19, "camvid": 11, "lip": 20, "coco_instances": 2,
}  # fmt: skip


def module(name, root, *words):
    cfg = configuration.compose([f"data={name}", f"data.root={root}", *SMALL, *words])
    found = load_datamodule(name)(cfg)
    found.setup()
    return found


def refused(name, root, *words, kind=DataError) -> str:
    with pytest.raises(kind) as error:
        module(name, root, *words)
    assert "\n" not in str(error.value)
    return str(error.value)


def ids(source) -> list[str]:
    return [source.id(i) for i in range(len(source))]


def stripes(label) -> list[int]:
    """The values of a label from left to right."""
    row = label[0].tolist()
    return [value for place, value in enumerate(row) if place == 0 or row[place - 1] != value]


def test_all_ten_are_there():
    assert set(OFFICIAL) == set(CLASSES) == set(trees.TREES)


@pytest.mark.parametrize("name", OFFICIAL)
def test_batches_of_every_set(name, tmp_path):
    found = module(name, trees.TREES[name](tmp_path))
    assert len(found.meta.names) == len(set(found.meta.names)) == len(found.meta.palette) == CLASSES[name]
    for loader in (found.train_dataloader(), found.val_dataloader()):
        batch = next(iter(loader))
        assert batch["image"].shape[:2] == (2, 3)
        values = set(batch["label"].unique().tolist())
        assert values - {IGNORE} <= set(range(CLASSES[name]))
        assert bool(values - {IGNORE}) is (name != "coco_instances" or loader.account.split == "val")
        assert "foreign" not in batch


@pytest.mark.parametrize("name", OFFICIAL)
def test_an_absent_set_is_one_line(name, tmp_path):
    expected = load_datamodule(name)(configuration.compose([f"data={name}"])).parts()
    first = next(iter(expected.values()))
    assert refused(name, "null", kind=ConfigError) == (
        f"data.root: data={name} needs the folder that holds {first.places[0]}; set data.root=<folder>; "
        f"`run.py data name={name}` says what to fetch and from where"
    )
    assert refused(name, tmp_path / "none") == (
        f"data.root={tmp_path}/none: there is no such folder; data={name} expects {first.places[0]} ({first.what}, "
        f"*{first.endings[0]}) in it; `run.py data name={name}` says what to fetch and where it belongs"
    )
    text = refused(name, tmp_path)
    assert text.startswith((f"data.root={tmp_path}: holds no ", "data.root"))
    assert text.endswith(f"`run.py data name={name}` says what to fetch and where it belongs")


@pytest.mark.parametrize("name", [name for name in OFFICIAL if load_datamodule(name).variants])
def test_class_counts_that_do_not_exist(name):
    known = " or ".join(str(count) for count in load_datamodule(name).variants)
    assert refused(name, "x", "data.classes=7", kind=ConfigError) == (
        f"data.classes=7: data={name} has labels of {known} classes"
    )


@pytest.mark.parametrize("name", ["cocostuff27", "cityscapes27", "potsdam3"])
def test_protocol_sets_resize_as_released(name, tmp_path):
    found = module(name, trees.TREES[name](tmp_path))
    assert found.train_geometry.interpolation == found.eval_geometry.interpolation == "faithful"
    assert found.train_geometry.flip_p == 0
    image, _ = found.source("val").read(0)
    small = found.dataset("val", found.eval_geometry, "x")[0].image
    side = min(image.shape[:2])
    scaled = Image.fromarray(image).resize(
        (16 * image.shape[1] // side, 16 * image.shape[0] // side), Image.Resampling.NEAREST
    )
    top, left = round((scaled.height - 16) / 2), round((scaled.width - 16) / 2)
    np.testing.assert_array_equal(small, np.asarray(scaled)[top : top + 16, left : left + 16])
    assert module(name, tmp_path, "data.interpolation=bilinear").eval_geometry.interpolation == "bilinear"


# ---- COCO ----


def test_cocostuff27(tmp_path, caplog):
    found = module("cocostuff27", trees.coco(tmp_path))
    assert ids(found.source("train")) == [f"{i:012d}" for i in range(1, 6)]
    assert ids(found.source("val")) == ["000000000001", "000000000002"]
    assert found.train_items == 25
    assert found.describe("val") == "val: 2 pictures of curated7"
    assert stripes(found.source("train").read(0)[1]) == [9, 17, 23, 22, 21, 255]
    assert found.source("train").read(2)[1] is None
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "cocostuff27: train has 5 pictures, the published split has 97702: scores are not comparable with published "
        "ones",
        "cocostuff27: val has 2 pictures, the published split has 2175: scores are not comparable with published ones",
    ]
    item = found.dataset("train", found.train_geometry, "x")[13]  # crop 3 of picture 2, which has no label
    assert item.id == "000000000003"
    assert (item.label == 255).all()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_outside_the_table_is_ignored_and_counted(tmp_path, caplog, workers):
    found = module("cocostuff27", trees.coco(tmp_path), f"data.workers={workers}")
    assert stripes(found.source("val").read(0)[1]) == [9, 17, 23, 22, 21, 255]
    found.source("val").take_foreign()
    list(found.val_dataloader()), list(found.val_dataloader())
    file = str(tmp_path / "annotations" / "val2017" / "000000000001.png")
    pixels = int((trees.ids([0, 91, 156, 168, 124, 200], 60, 41) == 200).sum())
    assert found.foreign["val"].files == {file: {200: pixels}}
    assert found.foreign["val"].pixels == {200: pixels}
    assert found.foreign["train"].pixels == {}
    warned = [record.getMessage() for record in caplog.records if "in no table" in record.getMessage()]
    assert warned == [
        f"{file}: {pixels} pixels have the value 200, which is in no table of this data set; they are ignored, and so "
        "is this value wherever else it occurs in 'val'"
    ]


def test_cocostuff_15_and_3(tmp_path):
    trees.coco(tmp_path)
    fifteen = module("cocostuff27", tmp_path, "data.classes=15")
    assert fifteen.list_name("train") == fifteen.list_name("val") == "curated7"
    assert stripes(fifteen.source("train").read(0)[1]) == [255, 5, 11, 10, 9, 255]
    assert fifteen.meta.names == coco_files.COARSE_NAMES[12:]
    three = module("cocostuff27", tmp_path, "data.classes=3", "data.batch_size=1")
    assert three.list_name("train") == three.list_name("val") == "few6"
    assert stripes(three.source("train").read(0)[1]) == [255, 0, 1, 2, 255]
    assert three.meta.names == ("sky", "plant", "ground")
    assert not three.foreign["val"].pixels


def test_coco_lists_by_name_and_by_file(tmp_path):
    trees.coco(tmp_path)
    full = module("cocostuff27", tmp_path, "data.eval_list=full")
    assert ids(full.source("val")) == [f"{i:012d}" for i in (1, 2, 4)]
    own = tmp_path / "own.txt"
    own.write_text("000000000004.jpg\n\n000000000001\n")
    assert ids(module("cocostuff27", tmp_path, f"data.eval_list={own}").source("val"))[0] == "000000000004"
    shutil.move(tmp_path / "curated", tmp_path / "lists")
    assert refused("cocostuff27", tmp_path, "data.train_list=full") == (
        f"data.eval_list=curated7: there is no file {tmp_path}/curated/val2017/Coco164kFull_Stuff_Coarse_7.txt; "
        f"`run.py data name=cocostuff27 root={tmp_path} rebuild=true` makes it from the labels"
    )
    assert len(module("cocostuff27", tmp_path, f"data.lists={tmp_path}/lists").source("val")) == 2
    assert refused("cocostuff27", tmp_path, "data.train_list=corse", f"data.lists={tmp_path}/lists") == (
        "data.train_list=corse: there is no file corse; expected auto, coarse, curated7, few6, full, or a text file "
        "with one id a line"
    )
    own.write_text("000000000004\n000000000099\n")
    assert refused("cocostuff27", tmp_path, f"data.eval_list={own}", "data.train_list=full") == (
        f"data.eval_list={own}: 1 of the 2 pictures of {own} are not in {tmp_path}/images/val2017, the first is "
        "000000000099; `run.py data name=cocostuff27` says what to fetch and where it belongs"
    )


def test_coco_as_its_archives_unpack_and_as_stego_nested_it(tmp_path):
    """train2017.zip and the label archive unpacked in one folder mix jpg and png; STEGO has a folder cocostuff."""
    trees.coco(tmp_path / "data" / "cocostuff")
    assert len(module("cocostuff27", tmp_path / "data").source("train")) == 5
    flat = tmp_path / "flat"
    trees.coco(flat)
    for split in ("train2017", "val2017"):
        shutil.move(flat / "images" / split, flat / split)
        for label in (flat / "annotations" / split).iterdir():
            label.rename(flat / split / label.name)
    found = module("cocostuff27", flat)
    assert len(found.source("train")) == 5
    assert found.source("train").read(0)[1] is not None


def test_cocostuff171(tmp_path):
    found = module("cocostuff171", trees.coco(tmp_path))
    assert [found.meta.names[value] for value in stripes(found.source("train").read(0)[1])[:-1]] == [
        "person", "banner", "sky-other", "tree", "gravel",
    ]  # fmt: skip
    labels = found.label_map()
    every, foreign = labels(np.arange(256, dtype=np.uint8)[None])
    assert sorted(every[every != 255].tolist()) == list(range(171))
    assert sorted(foreign) == sorted([*coco_files.UNUSED_THINGS, *range(182, 255)])


def test_coco81(tmp_path):
    found = module("coco81", trees.coco(tmp_path))
    assert stripes(found.source("train").read(0)[1]) == [1, 0, 255]
    assert (found.meta.names[0], found.meta.names[1], found.meta.names[80]) == ("background", "person", "toothbrush")
    filled = module("coco81", tmp_path, "data.unlabelled=background")
    assert stripes(filled.source("train").read(0)[1]) == [1, 0]
    assert refused("coco81", tmp_path, "data.unlabelled=x", kind=ConfigError) == (
        "data.unlabelled=x: not one of ignore, background"
    )


# ---- Cityscapes ----


def test_cityscapes(tmp_path):
    found = module("cityscapes27", trees.cityscapes(tmp_path))
    assert ids(found.source("train"))[0] == "aachen/aachen_000000_000019"
    assert [len(found.source(split)) for split in ("train", "val")] == [5, 2]
    assert stripes(found.source("train").read(0)[1]) == [255, 0, 1, 4, 26, 16, 255, 0]  # a 16-bit file
    assert stripes(found.source("train").read(1)[1]) == [255, 0, 1, 4, 26, 16, 255]
    assert list(found.source("train").take_foreign().values()) == [
        {40: int((trees.ids([0] * 9 + [40], 32, 64) == 40).sum())}
    ]
    assert found.train_items == 25
    nineteen = module("cityscapes27", tmp_path, "data.classes=19")
    assert stripes(nineteen.source("val").read(0)[1]) == [255, 0, 1, 2, 18, 10, 255, 0]
    assert nineteen.meta.names[:4] == ("road", "sidewalk", "building", "wall")
    assert nineteen.meta.names[-1] == "bicycle"
    other = module("cityscapes27", tmp_path, "data.split=picie")
    assert ids(other.source("train")) == [f"{name}_000019" for name in (
        "bonn/bonn_000000", "bayreuth/bayreuth_000000", "bayreuth/bayreuth_000001",
    )]  # fmt: skip
    assert [len(other.source(split)) for split in ("train", "val")] == [3, 7]
    assert other.source("train").read(0)[1] is None
    assert all(other.source("val").read(i)[1] is not None for i in range(7))
    shutil.move(tmp_path / "gtFine", tmp_path / "gt")
    assert refused("cityscapes27", tmp_path) == (
        f"data.root={tmp_path}: holds no gtFine/train (labels of train, *_gtfine_labelids.png); `run.py data "
        "name=cityscapes27` says what to fetch and where it belongs"
    )


# ---- Potsdam ----


def test_potsdam(tmp_path):
    found = module("potsdam3", trees.potsdam(tmp_path / "potsdam").parent)
    assert [len(found.source(split)) for split in ("train", "val")] == [4, 2]
    image, label = found.source("train").read(1)
    np.testing.assert_array_equal(image, noise(20, 20, seed=1))
    assert stripes(label) == [0, 1, 2, 0, 1, 255]
    assert found.source("train").take_foreign() != {}
    six = module("potsdam3", tmp_path, "data.classes=6")
    assert stripes(six.source("val").read(0)[1]) == [0, 1, 2, 3, 4, 5, 255]
    everything = module("potsdam3", tmp_path, "data.train_list=all")
    assert len(everything.source("train")) == 8
    assert everything.source("train").read(4)[1] is None  # unlabelled
    both = module("potsdam3", tmp_path, "data.train_list=train").source("train")
    assert len(both) == 6  # without the evaluated ones
    assert [both.read(index)[1] is None for index in (3, 4)] == [False, True]
    assert refused("potsdam3", tmp_path, "data.train_list=some", kind=ConfigError) == (
        "data.train_list=some: not one of labelled_train, unlabelled_train, train, all"
    )
    (tmp_path / "potsdam" / "labelled_test.txt").unlink()
    assert refused("potsdam3", tmp_path) == (
        f"data.root={tmp_path}: holds no labelled_test.txt, the list of val; `run.py data name=potsdam3` says what to "
        "fetch and where it belongs"
    )


def test_potsdam_blocks_that_cannot_be_read(tmp_path):
    trees.potsdam(tmp_path)
    block = tmp_path / "imgs" / "labelled_train_0.mat"
    block.write_bytes(block.read_bytes()[:100])
    savemat(tmp_path / "imgs" / "labelled_train_1.mat", {"image": np.zeros((20, 20, 4), np.uint8)})
    savemat(tmp_path / "imgs" / "labelled_train_2.mat", {"img": np.zeros((20, 20))})
    source = module("potsdam3", tmp_path, "data.max_broken=1").source("train")
    for index, reason in ((1, "it holds no variable img"), (2, "img is float64 of shape (20, 20), not uint8 [H,W,4]")):
        with pytest.raises(DataError) as error:
            source.read(index)
        assert str(error.value) == (
            f"{tmp_path}/imgs/labelled_train_{index}.mat: this file cannot be read as a picture ({reason})"
        )
    with pytest.raises(DataError, match=r"labelled_train_0\.mat: this file cannot be read as a picture"):
        source.read(0)


# ---- VOC ----


def test_voc_train_plus(tmp_path):
    found = module("pascal_voc", trees.voc(tmp_path))
    assert ids(found.source("train")) == ["2007_000032", "2007_000039", "2008_000002", "2008_000003", "2008_000007"]
    assert ids(found.source("val")) == ["2007_000033", "2007_000042"]
    assert stripes(found.source("train").read(0)[1]) == [0, 1, 255, 20]  # VOC's own label, not SBD's
    assert stripes(found.source("train").read(2)[1]) == [0, 15]
    assert found.meta.palette[:3] == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert found.meta.palette[20] == (0, 64, 128)
    plain = module("pascal_voc", tmp_path / "VOCdevkit" / "VOC2012", "data.train_list=train")
    assert len(plain.source("train")) == 2
    assert refused("pascal_voc", tmp_path / "VOCdevkit") == (
        f"data.root={tmp_path}/VOCdevkit: holds no benchmark_RELEASE/dataset/cls (labels of SBD, *.mat); `run.py data "
        "name=pascal_voc` says what to fetch and where it belongs"
    )


def test_voc_has_objects_one_by_one_where_their_maps_lie_beside_the_labels(tmp_path):
    found = module("pascal_voc", trees.voc(tmp_path))
    objects, label = found.source("val").instances(0), found.source("val").read(0)[1]
    assert objects.crowd.tolist() == [False, False, True]  # the last is the border between objects
    assert [int(np.unique(label[mask])[0]) for mask in objects.masks] == [1, 20, 255]
    assert found.source("train").instances(0) is None  # no map
    assert found.source("train").instances(2) is None  # of SBD
    save(tmp_path / "VOCdevkit/VOC2012/SegmentationObject/2007_000033.png", np.zeros((3, 3), np.uint8))
    with pytest.raises(DataError, match=r"2007_000033\.png"):
        found.source("val").instances(0)


# ---- KITTI, CamVid ----


def test_kitti_step(tmp_path):
    found = module("kitti", trees.kitti_step(tmp_path))
    assert ids(found.source("train")) == [f"0000/{i:06d}" for i in range(4)]
    assert ids(found.source("val")) == ["0002/000000", "0002/000001"]
    assert stripes(found.source("val").read(0)[1]) == [0, 10, 18, 255]
    save(tmp_path / "panoptic_maps" / "val" / "0002" / "000000.png", trees.ids([1], 30, 90))
    with pytest.raises(DataError) as error:
        module("kitti", tmp_path).source("val").read(0)
    assert str(error.value) == (
        f"{tmp_path}/panoptic_maps/val/0002/000000.png: a panoptic map is an RGB png with the class in its red "
        "channel, but this is a picture of mode L"
    )


def test_kitti_semantics(tmp_path):
    found = module("kitti", trees.kitti_semantics(tmp_path), "data.release=semantics")
    assert ids(found.source("val")) == ["000004_10", "000009_10"]
    assert len(found.source("train")) == 8
    assert stripes(found.source("val").read(0)[1]) == [255, 0, 11, 18]
    assert refused("kitti", tmp_path, "data.release=x", kind=ConfigError) == (
        "data.release=x: not one of step, semantics"
    )


def test_camvid(tmp_path):
    found = module("camvid", trees.camvid(tmp_path))
    assert stripes(found.source("val").read(0)[1]) == [0, 3, 10, 255]
    assert not found.source("val").take_foreign()
    test = module("camvid", tmp_path, "data.eval_split=test")
    assert ids(test.source("val")) == ["test_00000", "test_00001", "test_00002"]
    assert test.describe("val") == "test: 3 pictures"
    other = tmp_path / "other"
    for split in ("train", "val"):
        shutil.copytree(tmp_path / split, other / "images" / split)
        shutil.copytree(tmp_path / f"{split}annot", other / "labels" / split)
    assert len(module("camvid", other).source("train")) == 4


# ---- what is the same for all ----


def test_training_on_other_pictures(tmp_path):
    trees.camvid(tmp_path / "camvid")
    for i in range(3):
        save(tmp_path / "more" / f"m{i}.png", noise(seed=i))
    roots = f"data.train_roots=[{tmp_path}/camvid,{tmp_path}/more]"
    found = module("camvid", tmp_path / "camvid", roots)
    assert len(found.source("train")) == 4 + 3
    assert found.source("train").read(0)[1] is not None
    assert found.source("train").read(5)[1] is None
    alone = module("camvid", tmp_path / "camvid", f"data.train_roots=[{tmp_path}/more]")
    labelled = alone.labelled_source()  # read-outs that read labels read those of the published split
    assert (len(alone.source("train")), len(labelled)) == (3, 4)
    assert all(labelled.read(i)[1] is not None for i in range(4))
    assert module("camvid", tmp_path / "camvid").labelled_source() == "train"
    assert (alone.clustered_count(), found.clustered_count()) == (4, 4)  # k-means is fitted on pictures of the set
    other = module("camvid", tmp_path / "camvid", f"evaluation.kmeans.roots=[{tmp_path}/more,{tmp_path}/camvid]")
    assert other.clustered_count() == 3 + 4
    shutil.rmtree(tmp_path / "camvid" / "train")
    bare = module("camvid", tmp_path / "camvid", f"data.train_roots=[{tmp_path}/more]")
    assert bare.clustered_source() == "train"  # none of its own


def test_a_label_of_another_size(tmp_path):
    trees.camvid(tmp_path)
    save(tmp_path / "valannot" / "val_00001.png", trees.ids([1], 30, 48))
    assert refused("camvid", tmp_path) == (
        f"{tmp_path}/valannot/val_00001.png: the label is 48x30 pixels (width x height) but its picture "
        f"{tmp_path}/val/val_00001.png is 48x36; save the label at the picture's own size"
    )


def test_nothing_to_evaluate(tmp_path):
    trees.camvid(tmp_path)
    for label in (tmp_path / "valannot").iterdir():
        label.rename(label.with_name(f"other_{label.name}"))
    assert refused("camvid", tmp_path) == (
        f"data.root={tmp_path}: none of the 2 pictures to evaluate has a label; `run.py data name=camvid` says what to "
        "fetch and where it belongs"
    )


def test_complete_splits_give_no_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("datamodules.camvid.COUNTS", {"train": 4, "val": 2, "test": 3})
    with caplog.at_level(logging.INFO):
        module("camvid", trees.camvid(tmp_path))
    assert [record.getMessage() for record in caplog.records] == [
        "camvid: train of 4 pictures (4 with a label)",
        "camvid: val of 2 pictures (2 with a label)",
    ]


def test_labels_keep_their_place_through_five_crops(tmp_path):
    found = module("cityscapes27", trees.cityscapes(tmp_path))
    image, label = found.source("train").read(0)
    data = found.dataset("train", found.train_geometry, "x")
    boxes = [(0, 0), (0, 32), (16, 0), (16, 32), (8, 16)]
    for crop, (top, left) in enumerate(boxes):
        part = label[top : top + 16, left : left + 32]
        np.testing.assert_array_equal(data[crop].label, part[:, 8:24])
        np.testing.assert_array_equal(data[crop].image, image[top : top + 16, left + 8 : left + 24])
    assert torch.is_tensor(next(iter(found.train_dataloader()))["image"])


def test_lip_parts(tmp_path):
    """All 20 ids, through each of the three maps."""
    root = trees.lip(tmp_path)
    wanted = {
        5: [0, 1, 3, 1, 2, 5, 4, 2, 1, 3, 4, 5, IGNORE],
        16: [*range(17), IGNORE],
        19: [*range(20), IGNORE],
    }
    for classes, values in wanted.items():
        found = module("lip", root, f"data.classes={classes}")
        assert ids(found.source("train")) == ["1000_train", "1001_train", "1002_train", "1003_train"]
        assert len(found.meta.names) == classes + 1
        assert stripes(found.source("val").read(0)[1]) == values
    assert found.meta.names[14:16] == ("left_arm", "right_arm")
    assert refused("lip", root, "data.classes=20", kind=ConfigError) == (
        "data.classes=20: data=lip has labels of 5 or 16 or 19 classes"
    )
