"""One file of decoded and resized pictures, memory-mapped: written in one go, read at random by any process.

Layout: the bytes of all pictures and labels, one after the other; a table of where each lies; a json of what else is
known; a tail that names both and ends with MAGIC. The tail is written last and the file gets its name after that, so
a file that was cut, or belongs to other pictures or another geometry, is told by its tail and never read. Table, json
and every item have a check sum: one that a disk gives back changed is decoded again from its own file.
"""

import math
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.files import unfinished
from common.formats.sums import checksum, sealed, unsealed
from datamodules.base.label_map import Foreign
from datamodules.files.reading import UnreadableError

MAGIC = b"labelfree.decoded.2\n"
TAIL = struct.Struct(f"<QQQ{len(MAGIC)}s")
COLUMNS = 8
"""Of the table, int64: place of the picture (-1: unreadable), height, width, place of the label (-1: none), bytes of a
label's pixel, height and width of the picture in its file, check sum of picture and label."""


class ChangedError(Exception):
    """An item of a store is not what was written."""


class DecodedStore:
    """Items of a finished file: `store[i]` -> picture uint8 [h,w,3], label [h,w] or None, (height, width) before.

    Arrays are read-only views. Raises UnreadableError for a picture that could not be decoded when the file was made,
    ChangedError for one whose bytes are not those that were written.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self.data = np.memmap(self.path, dtype=np.uint8, mode="r")
        meta = _meta(self.data)
        if meta is None or meta["fingerprint"] != fingerprint:
            raise ValueError(f"{path}: cut, or made from other pictures or settings")
        first = meta["table"]
        self.table = np.frombuffer(
            self.data[first : first + 8 * COLUMNS * meta["items"]].tobytes(), dtype=np.int64
        ).reshape(-1, COLUMNS)
        if checksum(self.table) != meta["of_table"]:
            raise ValueError(f"{path}: changed since it was written")
        self.channels: int = meta.get("channels", 3)
        self.broken: dict[str, list[str]] = meta["broken"]
        self.foreign: Foreign = {
            file: {int(value): count for value, count in values.items()} for file, values in meta["foreign"].items()
        }

    @classmethod
    def find(cls, path: Path, fingerprint: str) -> "DecodedStore | None":
        """The store of a file; None where there is no file, or one that is cut or stale."""
        try:
            return cls(path, fingerprint)
        except (OSError, ValueError):
            return None

    def __reduce__(self) -> tuple:
        return DecodedStore, (self.path, self.fingerprint)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
        place, height, width, label_place, depth, *size, wanted = self.table[index].tolist()
        if place < 0:
            raise UnreadableError(*self.broken[str(index)])
        shape = height, width, self.channels
        image = self.data[place : place + math.prod(shape)].reshape(shape)
        label = None
        if label_place >= 0:
            values = self.data[label_place : label_place + depth * height * width]
            label = values.view(np.uint8 if depth == 1 else np.int32).reshape(height, width)
        if _sum(image, label) != wanted:
            raise ChangedError
        return image, label, (size[0], size[1])

    def mend(self, index: int, image: np.ndarray, label: np.ndarray | None) -> None:
        """Write an item anew that was decoded again, where it is what the file held and the file can be written to."""
        place, *_, label_place, _, _, _, wanted = self.table[index].tolist()
        if _sum(image, label) != wanted:
            return
        with suppress(OSError), self.path.open("r+b", buffering=0) as file:
            for start, array in ((place, image), (label_place, label)):
                if array is not None:
                    os.pwrite(file.fileno(), np.ascontiguousarray(array).data, start)


def _sum(image: np.ndarray, label: np.ndarray | None) -> int:
    return checksum(image) if label is None else checksum(image, label)


def _meta(data: np.ndarray) -> dict | None:
    """The json of a file; None where its tail does not fit its length. Raises ValueError where it was changed."""
    if len(data) < TAIL.size:
        return None
    table, place, length, magic = TAIL.unpack(data[-TAIL.size :].tobytes())
    if magic != MAGIC or place + length + TAIL.size != len(data) or table > place:
        return None
    return unsealed(data[place : place + length].tobytes()) | {"table": table}


class DecodedWriter:
    """Writes a store beside its final name; `finish` gives it the name, leaving the context without it removes it."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.channels = 3
        self.rows: list[tuple[int, ...]] = []
        self.broken: dict[int, list[str]] = {}

    def __enter__(self) -> "DecodedWriter":
        self.work = unfinished(self.path)
        self.file = self.work.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.work.__exit__(*exception)

    def add(self, image: np.ndarray, label: np.ndarray | None, size: tuple[int, int]) -> None:
        """The next item: uint8 [h,w,3] (as many channels as every other item), uint8 or int32 [h,w] or None."""
        self.channels = image.shape[2]
        place = self._write(image)
        label_place, depth = -1, 0
        if label is not None:
            label_place, depth = self._write(label), label.dtype.itemsize
        self.rows.append((place, *image.shape[:2], label_place, depth, *size, _sum(image, label)))

    def add_broken(self, error: UnreadableError) -> None:
        """The next item, which cannot be read."""
        self.broken[len(self.rows)] = [error.file, error.reason]
        self.rows.append((-1, 0, 0, -1, 0, 0, 0, 0))

    def finish(self, foreign: Foreign) -> None:
        """Everything is in: table, json and tail, then the name."""
        rows = np.array(self.rows, dtype=np.int64).reshape(-1, COLUMNS)
        table = self._write(rows)
        facts = {"fingerprint": self.fingerprint, "items": len(rows), "of_table": checksum(rows)}
        text = sealed(facts | {"channels": self.channels, "broken": self.broken, "foreign": foreign}).encode()
        place = self.file.tell()
        self.file.write(text + TAIL.pack(table, place, len(text), MAGIC))
        self.file.flush()
        os.fsync(self.file.fileno())
        Path(self.file.name).replace(self.path)

    def _write(self, array: np.ndarray) -> int:
        place = self.file.tell()
        self.file.write(np.ascontiguousarray(array).data)
        return place
