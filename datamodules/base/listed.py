"""A split that is a list of files: pictures, labels, the map of their values. What most data sets are."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.files import no_folder
from common.names import octets, of_results, shown
from datamodules.base.label_map import Foreign, LabelMap
from datamodules.files.reading import UnreadableError, check_size, header_size, read_label, read_picture
from datamodules.files.walking import no_pictures, pictures

LOOKED_AT = 5000
"""Pictures whose first bytes are read at the start; of larger sets this many, evenly spread."""


@dataclass(frozen=True)
class Entry:
    """A picture file, its name for people and for files made from it, and its label file if there is one."""

    id: str
    picture: str
    label: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", shown(self.id))


class ListedSource:
    """Pictures of a list of files; a `datamodules.base.Source`.

    `read(i)` gives the picture uint8 [H,W,3] and its label uint8 [H,W] in class ids, 255 = ignore (None without).
    Raises UnreadableError for a broken file, DataError for a label of another size than its picture.
    `channels`: of its pictures, 3, or 4 with infrared as the last. `headers`: pictures can be measured from their first
    bytes (False for .mat files).
    """

    headers = True
    channels = 3

    def __init__(
        self,
        entries: list[Entry],
        labels: LabelMap | None = None,
        read_picture: Callable[[str], np.ndarray] = read_picture,
        read_label: Callable[[str], np.ndarray] = read_label,
    ) -> None:
        self.entries = entries
        self.labels = labels
        self.read_picture = read_picture
        self.read_label = read_label
        self.foreign: Foreign = {}

    def __len__(self) -> int:
        return len(self.entries)

    def id(self, index: int) -> str:
        return self.entries[index].id

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        entry = self.entries[index]
        image = self.read_picture(entry.picture)
        return image, None if entry.label is None else self.mapped(entry, image)

    def mapped(self, entry: Entry, image: np.ndarray) -> np.ndarray | None:
        """The label of a picture in class ids; None where the data set has no classes."""
        if self.labels is None:
            return None
        values = self.read_label(entry.label)
        check_size(values, entry.label, image, entry.picture)
        label, foreign = self.labels(values)
        if foreign:
            self.foreign[entry.label] = foreign
        return label

    def take_foreign(self) -> Foreign:
        """Values outside the table that this process has met since the last call."""
        found, self.foreign = self.foreign, {}
        return found

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of a picture. Raises UnreadableError."""
        if self.headers:
            return header_size(self.entries[index].picture)
        return self.read_picture(self.entries[index].picture).shape[:2]

    def check(self) -> dict[str, str]:
        """{file: message} of the files whose first bytes are no picture; raises DataError for a label of another size.

        Reads headers only, of 5000 pictures at most; what lies deeper is found when the picture is read.
        """
        broken: dict[str, str] = {}
        if not self.headers:
            return broken
        for index in range(0, len(self), -(-len(self) // LOOKED_AT) or 1):
            entry = self.entries[index]
            try:
                size = header_size(entry.picture)
                if entry.label is not None and self.has_classes and self.label_size(entry.label) not in (None, size):
                    self.read(index)
            except UnreadableError as error:
                broken[error.file] = str(error)
        self.take_foreign()  # met again when the picture is read for a purpose
        return broken

    def labelled(self) -> list[int]:
        """Indices of the pictures that have a label."""
        return [index for index, entry in enumerate(self.entries) if entry.label is not None and self.has_classes]

    @property
    def has_classes(self) -> bool:
        """True where labels are read at all."""
        return self.labels is not None

    def label_size(self, path: str) -> tuple[int, int] | None:
        """(height, width) of a label from its first bytes; None for a .mat file, which is measured when it is read."""
        return None if path.lower().endswith(".mat") else header_size(path)

    def fingerprint(self) -> str:
        """Changes with the list, with the map of values, and with the size or time of any file."""
        digest = hashlib.sha256(type(self).__name__.encode())
        if self.labels is not None:
            digest.update(self.labels.table.tobytes() + self.labels.known.tobytes())
        for entry in self.entries:
            for path in (entry.picture, entry.label):
                digest.update(octets(stamp(path)))
            digest.update(octets(entry.id) + b"\0")
        return digest.hexdigest()


def stamp(path: str | None) -> str:
    """What tells a changed file from the one before: path, bytes and time of the last change."""
    if path is None:
        return "-\0"
    try:
        found = os.stat(path)
    except OSError:
        return f"{path}\0absent\0"
    return f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0"


def entries_below(root: str | Path, key: str) -> list[Entry]:
    """Every picture below a folder, without labels. `key` names it in errors. Raises DataError."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{key}={root}: {no_folder(root)}")
    found = pictures(root)
    if not found:
        raise no_pictures(key, root, "any depth")
    return [Entry(id, str(root / name)) for id, name in zip(of_results(found), found, strict=True)]
