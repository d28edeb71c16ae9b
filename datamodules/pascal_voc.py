"""PASCAL VOC 2012: background and 20 objects; 255, the border of objects, is ignored.

Where the folder SegmentationObject lies beside SegmentationClass, pictures of VOC have their objects one by one.

Evaluated on val (1,449). Trained on train (1,464) or on "train+" (10,582): VOC train with all pictures of the Semantic
Boundaries Dataset, less VOC val; labels of the latter come from SBD's .mat files.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from common.errors import DataError, one_of
from common.spec import IGNORE, ClassMeta
from datamodules.base.instances import Instances
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry, ListedSource
from datamodules.base.official import Check, Facts, OfficialDataModule, Part
from datamodules.files.reading import UnreadableError, check_size, read_label, read_mat

NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable",
    "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
COUNTS = {"train": 1464, "train_plus": 10582, "val": 1449}
VOC_FOLDERS = ("VOCdevkit/VOC2012", "VOC2012", "TrainVal/VOCdevkit/VOC2012", ".")
SBD_FOLDERS = ("benchmark_RELEASE/dataset", "SBD/benchmark_RELEASE/dataset", "SBD")
SBD_LISTS = {"train.txt": 8498, "val.txt": 2857}
OBJECTS = "SegmentationObject"
"""Folder of VOC, maps of objects one by one: 0 is nothing, 255 their borders."""


class VocSource(ListedSource):
    """Pictures of VOC and SBD."""

    def instances(self, index: int) -> Instances | None:
        """The objects of a picture, and their borders as a crowd; None where there is no file of them."""
        entry = self.entries[index]
        path = None if entry.label is None else Path(entry.label).parent.with_name(OBJECTS) / f"{entry.id}.png"
        if path is None or not path.is_file():
            return None
        ids = read_label(str(path))
        check_size(ids, path, np.zeros(self.size(index)), entry.picture)
        found = Instances.of_map(ids)
        return Instances(found.masks, np.array([bool((ids[mask] == IGNORE).all()) for mask in found.masks], bool))


class PascalVocDataModule(OfficialDataModule):
    """`data=pascal_voc data.train_list=train|train_plus`."""

    facts = Facts(
        title="PASCAL VOC 2012, with the Semantic Boundaries Dataset (SBD) for train+",
        home="http://host.robots.ox.ac.uk/pascal/VOC/voc2012 and the SBD page of the Berkeley vision group",
        terms="pictures under Flickr's terms of use; annotations free for research",
        downloads=(
            "VOCtrainval_11-May-2012.tar: pictures, labels and lists, into VOCdevkit/VOC2012",
            "benchmark.tgz of SBD (for train_list=train_plus): labels and lists, into benchmark_RELEASE/dataset",
        ),
    )

    @property
    def plus(self) -> bool:
        """True where SBD is needed."""
        one_of("data.train_list", self.data.train_list, ("train", "train_plus"))
        return self.data.train_list == "train_plus"

    def parts(self) -> dict[str, Part]:
        archive = "VOCtrainval_11-May-2012.tar"

        def below(folders: tuple[str, ...], name: str) -> tuple[str, ...]:
            return tuple(f"{folder}/{name}" if folder != "." else name for folder in folders)

        found = {
            "images": Part("pictures", below(VOC_FOLDERS, "JPEGImages"), (".jpg", ".jpeg"), 17125, archive),
            "labels": Part("labels", below(VOC_FOLDERS, "SegmentationClass"), (".png",), 2913, archive),
            "lists": Part("lists", below(VOC_FOLDERS, "ImageSets/Segmentation"), (".txt",), None, archive),
        }
        if self.plus:
            found["sbd.labels"] = Part(
                "labels of SBD", below(SBD_FOLDERS, "cls"), (".mat",), 11355, "benchmark.tgz of SBD"
            )
        return found

    def entries(self, split: str) -> list[Entry]:
        pictures, labels = self.files("images"), self.files("labels")
        names = self._names("val" if split == "val" else "train")
        if split == "train" and self.plus:
            labels = self.files("sbd.labels") | {name: labels[name] for name in names if name in labels}
            held_out = set(self._names("val"))
            names = sorted({*names, *self._sbd_names()} - held_out)
        return self.chosen(names, pictures, labels, f"pictures of {split}", str(self.find("images")), ".jpg")

    def _names(self, stem: str) -> list[str]:
        lists = self.files("lists")
        if stem not in lists:
            raise DataError(f"data.root={self.data.root}: holds no {self.find('lists')}/{stem}.txt; {self._help}")
        return Path(lists[stem]).read_text().split()

    def _sbd_names(self) -> list[str]:
        folder = self.find("sbd.labels")
        if folder is None:
            self.files("sbd.labels")
        for name in SBD_LISTS:
            if not (folder.parent / name).is_file():
                raise DataError(f"data.root={self.data.root}: holds no {folder.parent / name}; {self._help}")
        return [item for name in SBD_LISTS for item in (folder.parent / name).read_text().split()]

    def describe(self, split: str) -> str:
        return f"{super().describe(split)} of {self.data.train_list if split == 'train' else 'val'}"

    def official_count(self, split: str) -> int:
        return COUNTS["val" if split == "val" else self.data.train_list]

    def more_checks(self, rebuild: bool) -> Iterator[Check]:
        folder = self.find("sbd.labels") if self.plus else None
        if folder is not None:
            for name, count in SBD_LISTS.items():
                path = folder.parent / name
                found = len(path.read_text().split()) if path.is_file() else 0
                remedy = "" if found == count else "get benchmark.tgz of SBD again"
                yield Check(found == count, f"{SBD_FOLDERS[0]}/{name}", f"{found:,} of {count:,} names", remedy)

    def make_source(self, entries: list[Entry]) -> ListedSource:
        return VocSource(entries, self.label_map(), read_label=read_ids)

    def label_map(self) -> LabelMap:
        return LabelMap({value: value for value in range(len(NAMES))})

    def build_meta(self) -> ClassMeta:
        return ClassMeta(NAMES, tuple(colour(value) for value in range(len(NAMES))))


def read_ids(path: str) -> np.ndarray:
    """Class ids [H,W] of VOC's palette pngs and of SBD's .mat files. Raises UnreadableError."""
    if not path.lower().endswith(".mat"):
        return read_label(path)
    ids = read_mat(path, "GTcls")
    if ids.ndim != 2:
        raise UnreadableError(path, f"GTcls holds an array of shape {ids.shape}, not [H,W]")
    return ids


def colour(value: int) -> tuple[int, int, int]:
    """VOC's colour of a class: the bits of its id, three by three, from the highest bit of red, green and blue down."""
    channels = [0, 0, 0]
    for place in range(8):
        for channel in range(3):
            channels[channel] |= (value >> (3 * place + channel) & 1) << (7 - place)
    return channels[0], channels[1], channels[2]
