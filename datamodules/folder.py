"""Your own pictures: any tree of picture files, with or without labels.

Layouts of a folder, tried in this order:
1. `images/train/**`, `images/val/**`: split by folder; labels, where there are any, at the same relative stem as png in
   `labels/train`, `labels/val`. Without `images/val` a fixed tenth of the training pictures is held out.
2. `images/**` without these two: split as in 1; labels below `labels/`.
3. any pictures below the folder: no labels, split as in 1.
`classes.json` is the list of class names in id order; label values are 0..C-1, or 255 for pixels to ignore. Any picture
may lack a label. Further folders beside `images` and `labels` are not looked at.
"""

import logging
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import chance
from common.errors import ConfigError, DataError
from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.listed import Entry, ListedSource
from datamodules.opening import ENDINGS
from datamodules.reading import check_label, is_picture, read_classes, read_label
from datamodules.walking import files_below

log = logging.getLogger(__name__)

HELD_OUT = 10
"""Without `images/val`, one picture in this many is held out for validation."""


class FolderSource(ListedSource):
    """Pictures of a list of files, whose labels are class ids already.

    Raises DataError for a label value that is no class, beside what `ListedSource` raises.
    """

    def __init__(self, entries: list[Entry], classes: int) -> None:
        super().__init__(entries)
        self.classes = classes

    @property
    def has_classes(self) -> bool:
        return self.classes > 0

    def mapped(self, entry: Entry, image: np.ndarray) -> np.ndarray | None:
        if not self.classes:
            return None
        return check_label(read_label(entry.label), entry.label, image, entry.picture, self.classes)

    def fingerprint(self) -> str:
        return f"{super().fingerprint()}/{self.classes}"


@dataclass(frozen=True)
class Tree:
    """What a folder holds: pictures by split, and class names. `key` is the config key that named it."""

    root: Path
    key: str
    train: list[Entry]
    val: list[Entry] | None
    names: tuple[str, ...]

    @classmethod
    def find(cls, root: str | Path, key: str) -> "Tree":
        """Looks through a folder. Raises DataError where it is missing or breaks a rule of the layout."""
        root = Path(root).expanduser()
        if not root.is_dir():
            raise DataError(f"{key}={root}: there is no such folder")
        images, labels = root / "images", root / "labels"
        if labels.is_dir() and not images.is_dir():
            raise DataError(
                f"{key}={root}: holds a folder labels but no folder images; put the pictures into images, or into "
                "images/train and images/val"
            )
        names = read_classes(root / "classes.json")
        if not images.is_dir():
            return cls(root, key, _entries(root, None, key), None, names)
        if not any((images / split).is_dir() for split in ("train", "val")):
            return cls(root, key, _entries(images, labels, key), None, names)
        train, val = (
            _entries(images / split, labels / split, key) if _has_pictures(images / split) else []
            for split in ("train", "val")
        )
        if not train and not val:
            raise _no_pictures(key, root, "images/train and images/val")
        return cls(root, key, train, val or None, names)

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
        if not self._sources:
            self._entries, self._names = self._find()
        super().setup(stage)

    def build_source(self, split: str) -> FolderSource:
        return FolderSource(self._entries[split], len(self._names))

    def build_meta(self) -> ClassMeta:
        return ClassMeta(self._names, default_palette(len(self._names)))

    def _find(self) -> tuple[dict[str, list[Entry]], tuple[str, ...]]:
        if not self.data.root:
            raise ConfigError("data.root: data=folder needs a folder of pictures; set data.root=<folder>")
        tree = Tree.find(self.data.root, "data.root")
        trees = [Tree.find(root, "data.train_roots") for root in self.data.train_roots or ()]
        val = tree.evaluated()
        seen = {os.path.realpath(entry.picture) for entry in val}
        train = []
        for part in trees or [tree]:
            prefix = f"{part.root.resolve().name}/" if len(trees) > 1 else ""
            left = [entry for entry in part.train if os.path.realpath(entry.picture) not in seen]
            if not left:
                raise DataError(
                    f"{part.key}={part.root}: holds no pictures to train on"
                    + (" besides those it is evaluated on" if part.train else " (images/train is missing or empty)")
                    + "; add pictures, or name folders to train on in data.train_roots"
                )
            train += [Entry(prefix + entry.id, entry.picture, entry.label) for entry in left]
        names = _common_names([tree, *trees], {entry.picture for entry in train + val if entry.label})
        labelled = [sum(entry.label is not None for entry in part) for part in (train, val)]
        log.info(
            "folder: %d training pictures (%d with a label), %d for validation (%d with a label), %d classes",
            len(train), labelled[0], len(val), labelled[1], len(names),
        )  # fmt: skip
        return {"train": train, "val": val}, names


def pictures_below(root: str | Path, key: str = "input") -> FolderSource:
    """Every picture below a folder, without labels, for prediction. `key` names it in errors. Raises DataError."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{key}={root}: there is no such folder")
    return FolderSource(_entries(root, None, key), 0)


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
                f"{path}: absent or empty, but {tree.root / 'labels'} holds labels; write the class names in id order "
                'into it, such as ["sky", "road"]'
            )
        if first is not None and tree.names != names:
            raise DataError(
                f"{path}: its names differ from those of {first}, so label values would mean different classes; give "
                "both the same classes.json, or take the labels folder away to train on the pictures alone"
            )
        first, names = first or path, tree.names
    return names


def _entries(images: Path, labels: Path | None, key: str) -> list[Entry]:
    """The pictures below `images` in the order of their relative paths, each with the label of its relative stem."""
    pictures = files_below(images, is_picture)
    if not pictures:
        raise _no_pictures(key, images, "any depth")
    found = labels is not None and labels.is_dir()
    ids = files_below(labels, lambda name: name.lower().endswith(".png")) if found else []
    by_stem = {os.path.splitext(name)[0]: name for name in ids}
    stems = [os.path.splitext(name)[0] for name in pictures]
    if by_stem and not by_stem.keys() & set(stems):
        raise DataError(
            f"{labels}: holds {len(ids)} png files, but none is named after a picture of {images}; the label of "
            f"{images / pictures[0]} would be {labels / stems[0]}.png"
        )
    times = Counter(stems)
    return [
        Entry(
            id=stem if times[stem] == 1 else name,  # a.jpg beside a.png: both keep their ending
            picture=str(images / name),
            label=str(labels / by_stem[stem]) if stem in by_stem else None,
        )
        for stem, name in zip(stems, pictures, strict=True)
    ]


def _has_pictures(folder: Path) -> bool:
    return folder.is_dir() and bool(files_below(folder, is_picture))


def _no_pictures(key: str, folder: Path, where: str) -> DataError:
    return DataError(
        f"{key}: no pictures found in {folder} ({where}); looked for files ending in {', '.join(ENDINGS)}, in small or "
        "capital letters"
    )
