"""Made-up trees in the official layout of every published data set, with the quirks of the real ones: palette and
16-bit pngs, void ids, .mat labels, upper-case endings, pictures without labels, odd sizes, other programs' leftovers.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools.mask import encode
from scipy.io import savemat

from tests.datamodules.pictures import noise, save

BLOCKS = {"labelled_train": 4, "unlabelled_train": 2, "labelled_test": 2}


def ids(values: list[int], height: int, width: int) -> np.ndarray:
    """A label [H,W] of vertical stripes, one for each value."""
    return np.array(values, np.uint8)[np.arange(width) * len(values) // width][None].repeat(height, 0)


def palette_png(path: Path, label: np.ndarray) -> None:
    """A png whose pixels are indices of a colour table, as VOC and COCO-Stuff save them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(label, mode="P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    image.save(path)


def lines(path: Path, names: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{name}\n" for name in names))


def coco(root: Path) -> Path:
    """Six training and four validation pictures; the third of each has no label, the last is in no list.

    Labels: person, banner, sky-other, tree, gravel, unlabelled; a value 200 that no table knows in the first of val.
    """
    for split, count in (("train2017", 6), ("val2017", 4)):
        names = [f"{i + 1:012d}" for i in range(count)]
        for i, name in enumerate(names):
            height, width = (41, 60) if i % 2 else (60, 41)
            ending = ".JPG" if i == 1 else ".jpg"
            save(root / "images" / split / f"{name}{ending}", noise(height, width, seed=i))
            values = [0, 91, 156, 168, 124, 255] if i or split == "train2017" else [0, 91, 156, 168, 124, 200]
            if i != 2:
                palette_png(root / "annotations" / split / f"{name}.png", ids(values, height, width))
        (root / "images" / split / "._hidden.jpg").write_bytes(b"x")
        lines(root / "curated" / split / "Coco164kFull_Stuff_Coarse.txt", names[:-1])
        lines(root / "curated" / split / "Coco164kFull_Stuff_Coarse_7.txt", names[:2])
        lines(root / "curated" / split / "Coco164kFew_Stuff_6.txt", names[1:2])
    return root


def coco_instances(root: Path) -> Path:
    """Three training and two validation pictures: polygons, a compressed code and a group that was not taken apart; the
    second of val has no object. The COCO-20K list names two of train, as they were called in 2014."""
    for split, count in (("train2017", 3), ("val2017", 2)):
        parts = []
        for i in range(count):
            height, width = (41, 60) if i % 2 else (60, 41)
            save(root / "images" / split / f"{i + 1:012d}.jpg", noise(height, width, seed=i))
            if i == 1:
                continue
            group = np.zeros((height, width), np.uint8)
            group[40:, :10] = 1
            code = encode(np.asfortranarray(group))
            squares = [[2, 3, 12, 3, 12, 20, 2, 20], [30, 30, 38, 30, 38, 40, 30, 40]]
            parts += [
                {"image_id": i + 1, "segmentation": squares, "iscrowd": 0},
                {"image_id": i + 1, "segmentation": [[8, 10, 25, 10, 25, 30, 8, 30]], "iscrowd": 0},
                {"image_id": i + 1, "segmentation": code | {"counts": code["counts"].decode()}, "iscrowd": 1},
            ]
        path = root / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"annotations": parts}))
    lines(root / "coco20k.txt", ["COCO_train2014_000000000003.jpg", "train2014/COCO_train2014_000000000001.jpg"])
    return root


def cityscapes(root: Path) -> Path:
    """Two cities in train, one in val, one without labels in test and in train_extra; pictures of 64x32, 16-bit
    instance files and colours beside the label ids."""
    cities = {"train/aachen": 3, "train/bochum": 2, "val/ulm": 2, "test/bonn": 1, "train_extra/bayreuth": 2}
    for folder, count in cities.items():
        split, city = folder.split("/")
        for i in range(count):
            stem = f"{city}_{i:06d}_000019"
            save(root / "leftImg8bit" / split / city / f"{stem}_leftImg8bit.png", noise(32, 64, seed=i))
            label = ids([0, 3, 6, 7, 8, 11, 33, 23, 255, 40 if i else 7], 32, 64)
            if split in ("test", "train_extra"):
                continue
            gt = root / "gtFine" / split / city
            save(gt / f"{stem}_gtFine_labelIds.png", label if i else label.astype(np.uint16))
            save(gt / f"{stem}_gtFine_instanceIds.png", label.astype(np.uint16) * 1000)
            save(gt / f"{stem}_gtFine_color.png", noise(32, 64))
    return root


def potsdam(root: Path) -> Path:
    """Blocks of 20 px with four channels in .mat files; unlabelled ones have no gt file."""
    everything = []
    for split, count in BLOCKS.items():
        names = [f"{split}_{i}" for i in range(count)]
        lines(root / f"{split}.txt", names)
        everything += names
        for i, name in enumerate(names):
            (root / "imgs").mkdir(parents=True, exist_ok=True)
            (root / "gt").mkdir(exist_ok=True)
            block = np.dstack([noise(20, 20, seed=i), np.full((20, 20), 200, np.uint8)])
            savemat(root / "imgs" / f"{name}.mat", {"img": block})
            if split != "unlabelled_train":
                savemat(root / "gt" / f"{name}.mat", {"gt": ids([0, 1, 2, 3, 4, 5, 255, 9], 20, 20)})
    lines(root / "all.txt", everything)
    return root


def voc(root: Path) -> Path:
    """VOC with two training and two validation pictures; SBD with three more, one of VOC val and one of VOC train."""
    base = root / "VOCdevkit" / "VOC2012"
    train, val = ["2007_000032", "2007_000039"], ["2007_000033", "2007_000042"]
    extra = ["2008_000002", "2008_000003", "2008_000007"]
    for i, name in enumerate([*train, *val, *extra]):
        save(base / "JPEGImages" / f"{name}.jpg", noise(37, 50, seed=i))
        if name not in extra:
            palette_png(base / "SegmentationClass" / f"{name}.png", ids([0, 1, 255, 20], 37, 50))
            if name in val:
                palette_png(base / "SegmentationObject" / f"{name}.png", ids([0, 1, 255, 2], 37, 50))
    for stem, names in (("train", train), ("val", val), ("trainval", [*train, *val])):
        lines(base / "ImageSets" / "Segmentation" / f"{stem}.txt", names)
    dataset = root / "benchmark_RELEASE" / "dataset"
    (dataset / "cls").mkdir(parents=True)
    for name in [*extra, val[0], train[0]]:
        content = {"Boundaries": np.zeros((20, 1)), "Segmentation": ids([0, 15, 15], 37, 50), "CategoriesPresent": [15]}
        savemat(dataset / "cls" / f"{name}.mat", {"GTcls": content})
    lines(dataset / "train.txt", [extra[0], val[0], train[0]])
    lines(dataset / "val.txt", extra[1:])
    return root


def kitti_step(root: Path) -> Path:
    """Tracking sequences 0000 (train) and 0002 (val), panoptic maps with the class in red."""
    for sequence, split, count in (("0000", "train", 4), ("0002", "val", 2)):
        for i in range(count):
            save(root / "training" / "image_02" / sequence / f"{i:06d}.png", noise(30, 90, seed=i))
            panoptic = np.dstack([ids([0, 10, 18, 255], 30, 90), *[np.full((30, 90), 77, np.uint8)] * 2])
            save(root / "panoptic_maps" / split / sequence / f"{i:06d}.png", panoptic)
    return root


def kitti_semantics(root: Path) -> Path:
    """Ten pictures of 2015 with label ids of Cityscapes and 16-bit instances; testing has no labels."""
    for i in range(10):
        stem, label = f"{i:06d}_10", ids([0, 7, 24, 33], 30, 90)
        save(root / "training" / "image_2" / f"{stem}.png", noise(30, 90 + i % 2, seed=i))
        label = np.pad(label, ((0, 0), (0, i % 2)))
        save(root / "training" / "semantic" / f"{stem}.png", label)
        save(root / "training" / "instance" / f"{stem}.png", label.astype(np.uint16) * 256)
        save(root / "testing" / "image_2" / f"{stem}.png", noise(30, 90, seed=i))
    return root


def camvid(root: Path) -> Path:
    """The SegNet layout: ids 0..10 and 11 for unlabelled."""
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        for i in range(count):
            save(root / split / f"{split}_{i:05d}.png", noise(36, 48, seed=i))
            save(root / f"{split}annot" / f"{split}_{i:05d}.png", ids([0, 3, 10, 11], 36, 48))
    return root


def lip(root: Path) -> Path:
    """Four training and two validation pictures, the archives unpacked into folders of their own names; all 20 ids."""
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            name, label = f"{1000 + i}_{split}", ids([*range(20), 255], 64, 42)
            save(root / "TrainVal_images" / f"{split}_images" / f"{name}.jpg", noise(64, 42, seed=i))
            save(root / "TrainVal_parsing_annotations" / f"{split}_segmentations" / f"{name}.png", label)
    (root / "TrainVal_images" / "train_images" / "._1000_train.jpg").write_bytes(b"x")
    return root


TREES = {
    "cocostuff27": coco,
    "cocostuff171": coco,
    "coco81": coco,
    "coco_instances": coco_instances,
    "cityscapes27": cityscapes,
    "potsdam3": potsdam,
    "pascal_voc": voc,
    "kitti": kitti_step,
    "camvid": camvid,
    "lip": lip,
}
"""By name of the data set."""
