"""Your own pictures: any tree of picture files, with or without labels; docs/data.md says how a folder is read.

Layouts, by the names that `layouts.py` knows, in this order:
1. `images/train/**`, `images/val/**`, or `train/images/**`, `val/images/**`: split by folder; labels, where there are
   any, at the same relative stem as png, tif or bmp in a folder such as `labels` or `masks` in the same order. Without
   `val` a fixed tenth of the training pictures is held out.
2. `images/**` without these two: split as in 1; labels below `labels/` beside it.
3. any pictures below the folder, split as in 1; labels below `labels/` in it. What looks like labels among pictures
   (`strays.py`) ends in an error.
Objects one by one, for evaluation alone: pngs in a folder `instances` in the place of `images` (1. and 2.).
`classes.json` is the list of class names in id order; label values are 0..C-1, or 255 for pixels to ignore. Any picture
may lack a label.
"""

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import chance
from common.errors import ConfigError, DataError
from common.files import no_folder
from common.names import of_results
from common.palette import default_palette
from common.spec import ClassMeta, channels_of
from datamodules.base import SegmentationDataModule
from datamodules.base.instances import Instances
from datamodules.base.listed import Entry, ListedSource, entries_below
from datamodules.files import ranges, walking
from datamodules.files.ranges import Range
from datamodules.files.reading import check_size, read_classes, read_picture
from datamodules.files.walking import no_pictures
from datamodules.own import instance_maps, label_look, layouts, picture_look, strays
from datamodules.own.label_values import LabelValues
from datamodules.own.layouts import Part
from datamodules.own.pairing import other_files, pair

log = logging.getLogger(__name__)

HELD_OUT = 10
"""Without `images/val`, one picture in this many is held out for validation."""


class FolderSource(ListedSource):
    """Pictures of a list of files, whose labels are class ids already.

    Raises DataError for a label value that is no class, beside what `ListedSource` raises.
    """

    def __init__(
        self,
        entries: list[Entry],
        values: LabelValues | None = None,
        value_range: Range | None = None,
        channels: int = 3,
    ) -> None:
        """values: what the labels hold; None: no labels. value_range: of pictures of more than 8 bits. channels: of the
        pictures."""
        super().__init__(entries)
        self.values = values
        self.read_with(value_range, channels)
        self.classes = 0 if values is None else values.classes

    def read_with(self, value_range: Range | None, channels: int = 3) -> None:
        """From now on: the range of values of pictures of more than 8 bits, and the channels of a picture."""
        self.value_range, self.channels = value_range, channels
        self.read_picture = partial(read_picture, value_range=value_range, channels=channels)

    @property
    def has_classes(self) -> bool:
        return self.classes > 0

    def instances(self, index: int) -> Instances | None:
        """The objects of a picture by its id map (`own/instance_maps.py`); None where it has none."""
        picture = self.entries[index].picture
        path = instance_maps.beside(picture)
        return None if path is None else instance_maps.read(path, picture)

    def mapped(self, entry: Entry, image: np.ndarray) -> np.ndarray | None:
        if not self.classes:
            return None
        label = self.read_label(entry.label)
        check_size(label, entry.label, image, entry.picture)
        return self.values(label, entry.label)

    def fingerprint(self) -> str:
        values = self.values.facts() if self.values is not None else ""
        channels = "" if self.channels == 3 else f"/{self.channels}"
        return f"{super().fingerprint()}/{self.classes}{values}{self.value_range or ''}{channels}"


@dataclass(frozen=True)
class Tree:
    """What a folder holds: pictures by split, and class names. `key` is the config key that named it."""

    root: Path
    key: str
    train: list[Entry]
    val: list[Entry] | None
    names: tuple[str, ...]

    labels: str = ""
    """Where its labels are, or were looked for."""
    others: str = ""
    """What else was found there, in words."""

    @classmethod
    def find(cls, root: str | Path, key: str, data: Any = None, main: bool = True) -> "Tree":
        """Looks through a folder. `data`: the keys `data.*`, which name folders and suffixes; those of a folder that is
        not the `main` one need not be there.

        Raises DataError where it is missing or breaks a rule of the layout.
        """
        root, data = Path(root).expanduser(), {} if data is None else data
        if not root.is_dir():
            raise DataError(f"{key}={root}: {no_folder(root)}")
        images, labels = (str(data.get(name, "auto")) for name in ("images", "labels"))
        layout = layouts.find(root, key, images, labels, optional=not main)
        names = read_classes(root / "classes.json") if labels != "none" else ()
        parts = {split: _entries(part, root, key, data) for split, part in layout.parts.items()}
        if not any(parts.values()):
            folders = [f"{part.folder.relative_to(root).as_posix()}" for part in layout.parts.values()]
            split = layouts.WHOLE not in layout.parts
            raise no_pictures(key, root, " and ".join(folders)) if split else no_pictures(key, root, "any depth")
        unread = other_files(layout.labels)
        others = f", which holds {unread}" if unread else ""
        if not any(entry.label for part in parts.values() for entry in part):
            folders = [part.folder for part in layout.parts.values()]
            pictures = [entry.picture for part in parts.values() for entry in part]
            if names:
                others += strays.elsewhere(root, folders, pictures)
            elif labels == "auto":
                strays.expect_read(root, key, folders, pictures)
        found = layouts.said(layout.labels) or layouts.expected(root, labels)
        train = parts.get("train", []) if layouts.WHOLE not in parts else parts[layouts.WHOLE]
        return cls(root, key, train, parts.get("val") or None, names, found, others)

    def unpaired(self) -> str | None:
        """A line where classes are named and no picture has a label: they were not found, or not paired."""
        if not self.names or any(entry.label for entry in self.train + (self.val or [])):
            return None
        return (
            f"{self.root / 'classes.json'}: names {len(self.names)} classes, but no picture has a label; looked for "
            f"png, tif or bmp files in {self.labels}{self.others}; put the labels there under the names of their "
            "pictures, name their folder in data.labels, or set data.labels=none to train without them"
        )

    def evaluated(self) -> list[Entry]:
        """The pictures of `images/val`; without it a tenth of the others, at least one, chosen by their names alone."""
        if self.val is not None:
            return self.val
        count = max(1, len(self.train) // HELD_OUT)
        ranked = sorted(self.train, key=lambda entry: chance.key(0, f"folder.held_out/{entry.id}"))
        chosen = {entry.picture for entry in ranked[:count]}
        return [entry for entry in self.train if entry.picture in chosen]


class FolderDataModule(SegmentationDataModule):
    """`data=folder data.root=…`: evaluated on `data.root`; trained on its training part, or on `data.train_roots`."""

    def setup(self, stage: str | None = None) -> None:
        if self._sources:
            return
        self._entries, self._names = self._find()
        self._values = LabelValues(self.data.label_values, self._names)
        self._range = picture_look.settle(self._entries["train"], ranges.parse(self.data.value_range))
        super().setup(stage)
        label_look.examine(self._entries, self._names, self._values)

    def build_source(self, split: str) -> FolderSource:
        return FolderSource(self._entries[split], self._values, self._range, channels_of(self.data))

    def own_source(self) -> str | FolderSource:
        if not self.data.train_roots:
            return "train"
        own = _apart(Tree.find(self.data.root, "data.root", self.data), self._entries["val"])
        return self._unlabelled(own) if own else "train"

    def source_below(self, roots: list[str], key: str) -> FolderSource:
        trees = [Tree.find(root, key, self.data, main=False) for root in roots]
        return self._unlabelled([entry for tree in trees for entry in self._to_train_on(tree, self._entries["val"])])

    def _unlabelled(self, entries: list[Entry]) -> FolderSource:
        bare = [Entry(entry.id, entry.picture, None) for entry in entries]
        return FolderSource(bare, None, self._range, channels_of(self.data))

    def settled(self) -> dict[str, Any]:
        return {"data.value_range": None if self._range is None else list(self._range)}

    def build_meta(self) -> ClassMeta:
        return ClassMeta(self._names, default_palette(len(self._names)))

    @staticmethod
    def _to_train_on(part: Tree, val: list[Entry]) -> list[Entry]:
        """The pictures of a folder besides those that are evaluated. Raises DataError where there are none."""
        left = _apart(part, val)
        if not left:
            wanted = "folders to train on in data.train_roots" if part.key.startswith("data.") else "other folders"
            raise DataError(
                f"{part.key}={part.root}: holds no pictures to train on"
                + (" besides those it is evaluated on" if part.train else " (images/train is missing or empty)")
                + f"; add pictures, or name {wanted}"
            )
        return left

    def _find(self) -> tuple[dict[str, list[Entry]], tuple[str, ...]]:
        if not self.data.root:
            raise ConfigError("data.root: data=folder needs a folder of pictures; set data.root=<folder>")
        tree = Tree.find(self.data.root, "data.root", self.data)
        trees = [Tree.find(root, "data.train_roots", self.data, main=False) for root in self.data.train_roots or ()]
        if (line := tree.unpaired()) is not None:
            raise DataError(line)
        for line in filter(None, (other.unpaired() for other in trees if other.root != tree.root)):
            log.warning("%s", line)
        val = tree.evaluated()
        train = []
        for part in trees or [tree]:
            prefix = f"{part.root.resolve().name}/" if len(trees) > 1 else ""
            left = self._to_train_on(part, val)
            train += [Entry(prefix + entry.id, entry.picture, entry.label) for entry in left]
        names = _common_names([tree, *trees], {entry.picture for entry in train + val if entry.label})
        labelled = [sum(entry.label is not None for entry in part) for part in (train, val)]
        log.info(
            "folder: %d training pictures (%d with a label), %d for validation (%d with a label), %d classes",
            len(train), labelled[0], len(val), labelled[1], len(names),
        )  # fmt: skip
        return {"train": train, "val": val}, names


def _apart(tree: Tree, val: list[Entry]) -> list[Entry]:
    """The training pictures of a folder that are not among those that are evaluated."""
    seen = {os.path.realpath(entry.picture) for entry in val}
    return [entry for entry in tree.train if os.path.realpath(entry.picture) not in seen]


def expect_apart(cfg: Any, **targets: str | Path | None) -> None:
    """Raises ConfigError where something is to be written where the pictures of `data=folder` are looked for, so that
    the next start would read it as pictures. targets: key -> path (None: nothing)."""
    if cfg.data.name != "folder" or not cfg.data.root:
        return
    names = [str(cfg.data[key]) for key in ("images", "labels")]
    roots = [("data.root", cfg.data.root), *(("data.train_roots", root) for root in cfg.data.train_roots or ())]
    for key, root in roots:
        parts = layouts.find(Path(root).expanduser(), key, *names, optional=key != "data.root").parts
        for target, path in targets.items():
            if path is not None:
                walking.expect_apart([(key, part.folder) for part in parts.values()], target, path)


def pictures_below(root: str | Path, key: str = "input", data: Any = None) -> FolderSource:
    """Every picture below a folder, without labels, for prediction. `key` names it in errors; `data`: the keys `data.*`
    of the run, whose range of values is kept. Raises DataError."""
    entries = entries_below(root, key)
    if data is None:
        return FolderSource(entries)
    chosen, channels = ranges.kept(data), channels_of(data)
    picture_look.settle(entries, chosen, settable="value_range" in data)
    return FolderSource(entries, value_range=chosen, channels=channels)


def _common_names(trees: list[Tree], labelled: set[str]) -> tuple[str, ...]:
    """The class names of all folders whose labels are used; none where there are no labels. Raises DataError."""
    names: tuple[str, ...] = ()
    first = None
    for tree in trees:
        if not any(entry.picture in labelled for entry in tree.train + (tree.val or [])):
            continue
        path = tree.root / "classes.json"
        if not tree.names:
            raise DataError(
                f"{path}: absent or empty, but there are labels in {tree.labels}; write the class names in id order "
                'into it, such as ["sky", "road"], or set data.labels=none to train on the pictures alone'
            )
        if first is not None and tree.names != names:
            raise DataError(
                f"{path}: its names differ from those of {first}, so label values would mean different classes; give "
                "both the same classes.json, or set data.labels=none to train on the pictures alone"
            )
        first, names = first or path, tree.names
    return names


def _entries(part: Part, root: Path, key: str, data: Any) -> list[Entry]:
    """The pictures of a part in the order of their relative paths, each with its label. Raises DataError."""
    pictures = part.pictures()
    suffixes = str(data.get("image_suffix", "")), str(data.get("label_suffix", ""))
    if part.labels is not None and part.labels.resolve() == part.folder.resolve():
        if not suffixes[1]:
            raise DataError(
                f"data.labels={data.labels}: is the folder of the pictures; set data.label_suffix to what the names of "
                "the labels end in, such as _mask"
            )
        pictures = [name for name in pictures if not os.path.splitext(name)[0].endswith(suffixes[1])]
    elif data.get("images", "auto") == "auto":
        strays.expect_none(part.folder, pictures, root, key)
    labels = pair(part.folder, pictures, part.labels, *suffixes) if pictures else {}
    return [
        Entry(id, str(part.folder / name), labels.get(name))
        for id, name in zip(of_results(pictures), pictures, strict=True)
    ]
