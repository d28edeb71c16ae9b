"""COCO with its objects one by one: val2017, or the 19,817 training pictures of the COCO-20K list.

All objects are one category, as zero-shot evaluations of CutLER (CVPR 2023) take them. The label map that goes with
them has two classes: an object is where any annotation is, groups that COCO did not take apart (`iscrowd`) are ignored.
Trained on train2017 without a label, or on `data.train_roots`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_masks

from common.errors import DataError
from common.spec import IGNORE, ClassMeta
from datamodules.base.coco_files import PUBLISHED, read_list
from datamodules.base.instances import Instances
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry, ListedSource
from datamodules.base.official import Check, Facts, OfficialDataModule, Part

LIST, LISTED = "coco20k", 19_817
"""The list that LOST (BMVC 2021) drew of train2014, and how many pictures it has."""
OLD = "COCO_train2014_"
"""What names of pictures began with before 2017."""

Annotations = dict[int, list[dict[str, Any]]]
"""Annotations of a file by the number of their picture."""


class InstanceSource(ListedSource):
    """Pictures with annotations: an entry's label is the file that holds them."""

    has_classes = True

    def __init__(self, entries: list[Entry], annotations: dict[str, Annotations]) -> None:
        super().__init__(entries, LabelMap({0: 0, 1: 1}))
        self.annotations = annotations

    def mapped(self, entry: Entry, image: np.ndarray) -> np.ndarray:
        found = self._drawn(entry, image.shape[:2])
        label = found.masks[~found.crowd].any(0).astype(np.uint8)
        label[found.masks[found.crowd].any(0) & (label == 0)] = IGNORE
        return label

    def instances(self, index: int) -> Instances | None:
        """Every annotation of a picture; None of one that has no file of annotations."""
        entry = self.entries[index]
        return None if entry.label is None else self._drawn(entry, self.size(index))

    def label_size(self, path: str) -> None:
        """Annotations have the size that they are drawn at."""

    def _drawn(self, entry: Entry, size: tuple[int, int]) -> Instances:
        own = self.annotations[entry.label].get(number_of(entry.picture), [])
        masks = [drawn(part["segmentation"], size, entry) for part in own]
        crowd = np.array([bool(part.get("iscrowd")) for part in own], bool)
        return Instances(np.stack(masks) if masks else np.zeros((0, *size), bool), crowd)


class CocoInstancesDataModule(OfficialDataModule):
    """`data=coco_instances`."""

    facts = Facts(
        title="COCO 2017 with its objects one by one, of one category (val2017, or the COCO-20K list)",
        home="https://cocodataset.org",
        terms="annotations CC BY 4.0; the pictures under Flickr's terms of use, rights with their photographers",
        downloads=(
            "train2017.zip and val2017.zip: pictures, into images/train2017 and images/val2017",
            "annotations_trainval2017.zip: instances_train2017.json and instances_val2017.json, into annotations",
            "coco_20k_filenames.txt (github.com/valeoai/LOST): the COCO-20K list, as coco20k.txt beside images; with "
            "data.eval_list=coco20k alone",
        ),
    )

    def parts(self) -> dict[str, Part]:
        found = {}
        for split, count in PUBLISHED.items():
            found[f"{split}.images"] = Part(
                f"pictures of {split}", (f"images/{split}", split), (".jpg", ".jpeg"), count, f"{split}.zip of COCO"
            )
        found["annotations"] = Part(
            "annotations", ("annotations",), (".json",), None, "annotations_trainval2017.zip of COCO"
        )
        return found

    def entries(self, split: str) -> list[Entry]:
        if split == "train":
            return self.paired("train2017.images", None)
        folder = "val2017" if self._list == "val2017" else "train2017"
        pictures, path = self.files(f"{folder}.images"), self._annotations(folder)
        if self._list == "val2017":
            names = list(pictures)
        else:
            names = [name.rpartition("/")[2].removeprefix(OLD) for name in read_list(self._list_file)]
        labels = dict.fromkeys(names, str(path))
        return self.chosen(names, pictures, labels, f"pictures of {self._list}", f"images/{folder}", ".jpg")

    def make_source(self, entries: list[Entry]) -> InstanceSource:
        files: dict[str, set[int]] = {}
        for entry in entries:
            if entry.label is not None:
                files.setdefault(entry.label, set()).add(number_of(entry.picture))
        return InstanceSource(entries, {path: read_annotations(path, wanted) for path, wanted in files.items()})

    def build_meta(self) -> ClassMeta:
        return ClassMeta(("background", "object"), ((96, 96, 96), (222, 44, 52)))

    def describe(self, split: str) -> str:
        return f"{super().describe(split)} of {self._list if split == 'val' else 'train2017'}"

    def official_count(self, split: str) -> int | None:
        if split == "train":
            return PUBLISHED["train2017"]
        return {"val2017": PUBLISHED["val2017"], LIST: LISTED}.get(self._list)

    def more_checks(self, rebuild: bool) -> Iterator[Check]:
        for folder in PUBLISHED:
            if folder == "val2017" or self._list != "val2017":
                name = f"annotations/instances_{folder}.json"
                there = (self.base / name).is_file()
                remedy = "" if there else "get annotations_trainval2017.zip of COCO"
                yield Check(there, name, "there" if there else "absent", remedy)

    @property
    def _list(self) -> str:
        return str(self.data.eval_list)

    @property
    def _list_file(self) -> Path:
        path = self.base / f"{LIST}.txt" if self._list == LIST else Path(self._list).expanduser()
        if not path.is_file():
            raise DataError(
                f"data.eval_list={self._list}: there is no file {path}; expected val2017, {LIST}, or a text file with "
                "the name of one picture of train2017 a line"
            )
        return path

    def _annotations(self, folder: str) -> Path:
        path = self.base / "annotations" / f"instances_{folder}.json"
        if not path.is_file():
            raise DataError(f"data.root={self.data.root}: holds no annotations/{path.name}; {self._help}")
        return path


def number_of(picture: str) -> int:
    """The number of a picture, which its file is named after."""
    return int(Path(picture).stem.removeprefix(OLD))


def read_annotations(path: str, wanted: set[int]) -> Annotations:
    """The annotations of some pictures, in the file's order. Raises DataError for a file that is not COCO's."""
    try:
        content = json.loads(Path(path).read_bytes())
        found: Annotations = {}
        for part in content["annotations"]:
            if part["image_id"] in wanted:
                kept = {key: part[key] for key in ("segmentation", "iscrowd") if key in part}
                found.setdefault(part["image_id"], []).append(kept)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: cannot be read as annotations of COCO ({error}); get the file again") from None
    return found


def drawn(segmentation: Any, size: tuple[int, int], entry: Entry) -> np.ndarray:
    """The mask bool [H,W] of polygons, or of a run-length code, compressed or not. Raises DataError."""
    try:
        if isinstance(segmentation, list):
            code = coco_masks.merge(coco_masks.frPyObjects(segmentation, *size))
        elif isinstance(segmentation["counts"], list):
            code = coco_masks.frPyObjects(segmentation, *size)
        else:
            code = segmentation
        mask = coco_masks.decode(code).astype(bool)
    except Exception as error:
        raise DataError(f"{entry.label}: an annotation of {entry.id} cannot be drawn ({error})") from None
    if mask.shape != tuple(size):
        raise DataError(
            f"{entry.label}: an annotation of {entry.id} is {mask.shape[0]} x {mask.shape[1]} pixels and its picture "
            f"{size[0]} x {size[1]}; get picture and annotations of one release"
        )
    return mask
