"""ISPRS Potsdam in three classes, or in its six: blocks of 200 x 200 pixels, as IIC cut them.

The blocks have random names, so the lists of the release are indispensable. Of 8,550 blocks 5,400 have labels: 4,545 to
train on, 855 to evaluate. Infrared, the fourth channel, is left out unless `data.channels` is 4.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from common.errors import DataError, one_of
from common.spec import ClassMeta, channels_of
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry, ListedSource
from datamodules.base.official import Check, Facts, OfficialDataModule, Part
from datamodules.files.reading import UnreadableError, read_mat

SIX = (
    ("roads", (255, 255, 255)), ("buildings", (0, 0, 255)), ("vegetation", (0, 255, 255)), ("trees", (0, 255, 0)),
    ("cars", (255, 255, 0)), ("clutter", (255, 0, 0)),
)  # fmt: skip
THREE = (("roads and cars", (255, 255, 255)), ("buildings and clutter", (0, 0, 255)), ("vegetation", (0, 255, 0)))
SIX_TO_THREE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
COUNTS = {"labelled_train": 4545, "unlabelled_train": 3150, "labelled_test": 855, "all": 8550}
"""Blocks of each list."""
TRAIN_LISTS = {
    "labelled_train": ("labelled_train",),
    "unlabelled_train": ("unlabelled_train",),
    "train": ("labelled_train", "unlabelled_train"),
    "all": ("all",),
}
"""Lists of each choice of `data.train_list`."""


class BlockSource(ListedSource):
    """Blocks in .mat files."""

    headers = False

    def __init__(self, entries: list[Entry], labels: LabelMap, channels: int = 3) -> None:
        super().__init__(entries, labels, partial(read_block, channels=channels), read_ids)
        self.channels = channels


class Potsdam3DataModule(OfficialDataModule):
    """`data=potsdam3 data.classes=3|6`."""

    variants = (3, 6)
    folders = ("potsdam",)
    facts = Facts(
        title="ISPRS 2D Semantic Labelling, Potsdam, in the blocks of IIC",
        home="https://www.isprs.org (2D Semantic Labeling Contest, Potsdam; registration)",
        terms="ISPRS and BSF Swissphoto: research use, with acknowledgement",
        downloads=(
            "the archive `potsdam` of the STEGO release (github.com/mhamilton723/STEGO): imgs/*.mat, gt/*.mat and the "
            "lists; or the tiles of the home page, cut by potsdam_prepare.py of github.com/xu-ji/IIC",
        ),
        notes=("blocks cut anew get new random names: they do not fit lists of another cut",),
    )

    def parts(self) -> dict[str, Part]:
        archive = "the archive `potsdam` of the STEGO release"
        return {
            "images": Part("blocks", ("imgs",), (".mat",), COUNTS["all"], archive),
            "labels": Part("labels", ("gt",), (".mat",), 5400, archive),
        }

    def entries(self, split: str) -> list[Entry]:
        names = []
        for name in self._lists(split):
            path = self._list_file(name)
            if not path.is_file():
                raise DataError(f"data.root={self.data.root}: holds no {name}.txt, the list of {split}; {self._help}")
            names += [line.strip() for line in path.read_text().splitlines() if line.strip()]
        blocks, labels = self.files("images"), self.files("labels", needed=split == "val")
        files = " and ".join(f"{name}.txt" for name in self._lists(split))
        return self.chosen(names, blocks, labels, f"blocks of {files}", "imgs", ".mat")

    def _lists(self, split: str) -> tuple[str, ...]:
        if split != "train":
            return ("labelled_test",)
        one_of("data.train_list", self.data.train_list, TRAIN_LISTS)
        return TRAIN_LISTS[self.data.train_list]

    def _list_file(self, name: str) -> Path:
        return self.base / f"{name}.txt"

    def describe(self, split: str) -> str:
        return f"{super().describe(split)} of {' and '.join(self._lists(split))}"

    def official_count(self, split: str) -> int:
        return sum(COUNTS[name] for name in self._lists(split))

    def more_checks(self, rebuild: bool) -> Iterator[Check]:
        for name, count in COUNTS.items():
            path = self._list_file(name)
            found = len(path.read_text().split()) if path.is_file() else 0
            remedy = "" if found == count else "get the lists that belong to these blocks; they cannot be made anew"
            yield Check(found == count, path.name, f"{found:,} of {count:,} names", remedy)

    def make_source(self, entries: list[Entry]) -> BlockSource:
        return BlockSource(entries, self.label_map(), channels_of(self.data))

    def label_map(self) -> LabelMap:
        return label_map(self.data.classes)

    def build_meta(self) -> ClassMeta:
        chosen = THREE if self.data.classes == 3 else SIX
        return ClassMeta(tuple(name for name, _ in chosen), tuple(colour for _, colour in chosen))


def label_map(classes: int) -> LabelMap:
    """The six ids of the blocks -> 3 or 6 classes."""
    return LabelMap(SIX_TO_THREE if classes == 3 else {value: value for value in range(len(SIX))})


def read_block(path: str, channels: int = 3) -> np.ndarray:
    """uint8 [H,W,channels] of a block with red, green, blue and infrared. Raises UnreadableError."""
    block = read_mat(path, "img")
    if block.ndim != 3 or block.shape[2] < channels or block.dtype != np.uint8:
        raise UnreadableError(path, f"img is {block.dtype} of shape {block.shape}, not uint8 [H,W,4]")
    return np.ascontiguousarray(block[..., :channels])


def read_ids(path: str) -> np.ndarray:
    """Class ids [H,W] of a block. Raises UnreadableError."""
    ids = read_mat(path, "gt")
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise UnreadableError(path, f"gt is {ids.dtype} of shape {ids.shape}, not whole numbers [H,W]")
    return ids
