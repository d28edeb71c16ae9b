"""What an offline stage keeps: records of pictures, tables and weights, below `<cache.dir>/pseudo/<stage>/`.

A step has the folder `<step>-<fingerprint>`, named after everything that its content depends on, so one of other
settings is never found. Records lie in shards of a fixed number of pictures, `shards/0000012.safetensors`: whole or not
there at all, and the same bytes whichever rank or start made them. `manifest.json` comes last; without it a folder is
unfinished, and the next start computes the shards that are missing. Everything has a check sum, which is compared
before a stage goes by what is there and whenever a record is read. Nothing that is read can run code.
"""

import contextlib
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError, safe_open

from common.errors import DataError
from common.files import clear_when_full, remove_leftovers, sync_folder, unfinished
from common.formats.sums import SUM, checksum, read_sealed, sealed

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the layout changes, so that folders of before are not found any more."""
MANIFEST, TABLE, WEIGHTS = "manifest.json", "table.safetensors", "weights.safetensors"
UNREADABLE = "unreadable"
"""Why a picture was dropped whose file could not be read."""
CHANGED = "changed since it was written"
OPEN = 512
"""Shards that a reader keeps open at most."""
NOTES = "labelfree"
"""The one entry of a shard's metadata: several would be written in an order by chance."""


@dataclass
class Record:
    """What a map step found in one picture. A picture that gave nothing is a record too: `drop` says why."""

    index: int
    """Position in the data set."""
    id: str
    size: tuple[int, int]
    """Height and width of the picture in its file, px."""
    grid: tuple[int, int]
    """h and w of the patch grid that maps [..,h,w] of the fields have."""
    extent: tuple[float, float] = (1.0, 1.0)
    """How much of the picture's height and width the grid covers from the upper left: below 1 where the rest was cut
    off, above 1 where the network saw padding."""
    fields: dict[str, np.ndarray] = field(default_factory=dict)
    """Arrays of at least one axis by name; a name has one type and one number of axes throughout a step. Names that are
    in use, and that `views.py` reads: `segments` int16 [h,w] (ids; 0 = background), `names` int16 [R] (ids of the
    regions that the next two describe), `features` float [R,D], `boxes` [R,4] (x0 y0 x1 y1, exclusive, px of the file);
    `masks` bool [n,H,W] (at any size) with `scores` float32 [n] and `classes` int16 [n]; `eigenvalues` [K],
    `eigenvectors` float16 [K,h,w]; `class_map` float16 [K,h,w]."""
    drop: str = ""
    """Empty for a picture that is kept, else why not: no_object, too_small, not_core, failed, unreadable, …"""

    @property
    def keep(self) -> bool:
        return not self.drop


@dataclass(frozen=True)
class Place:
    """The folder of a step, by what its content depends on (`facts`, plain values)."""

    root: Path
    name: str
    facts: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        text = json.dumps([FORMAT, self.name, self.facts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def path(self) -> Path:
        return self.root / f"{self.name}-{self.fingerprint[:20]}"

    @property
    def complete(self) -> bool:
        """Whether all of it is there: the manifest, and every file that it speaks of."""
        try:
            found = self.manifest()
        except DataError:
            return False
        if found["fingerprint"] != self.fingerprint:
            return False
        if "shard" in found and self.missing(found["pictures"], found["shard"]):
            return False
        return all((self.path / name).is_file() for name in found["sums"])

    @property
    def sound(self) -> bool:
        """`complete`, and all of it as it was written. It is read once; a file that was changed is named and removed,
        so that it is made again."""
        found: dict[str, Any] = {"sums": {}}
        if (self.path / MANIFEST).exists():
            with told():
                found = self.manifest()
        for path in sorted((self.path / "shards").glob("*.safetensors")):
            with told():
                shard = Shard(path)
                for row in range(len(shard.rows)):
                    shard.record(row)
        for name in found["sums"]:
            if (self.path / name).is_file():
                with told():
                    self.content(name)
        return self.complete

    def manifest(self) -> dict[str, Any]:
        """What `finish` wrote. Raises DataError where it is not there or damaged."""
        try:
            return read_sealed(self.path / MANIFEST)
        except (OSError, ValueError) as error:
            raise damaged(self.path / MANIFEST, error) from None

    def finish(self, facts: Mapping[str, Any], **files: bytes) -> None:
        """Write these files of the folder (by their names without ending), then the manifest, after everything else."""
        sums = {}
        for name, content in files.items():
            put(self.path / f"{name}.safetensors", content)
            sums[f"{name}.safetensors"] = checksum(content)
        found = {"format": FORMAT, "step": self.name, "fingerprint": self.fingerprint, "inputs": self.facts, **facts}
        put(self.path / MANIFEST, sealed(found | {"sums": sums}, indent=2, sort_keys=True).encode())

    def content(self, name: str) -> bytes:
        """A file that `finish` wrote. Raises DataError where it is not what was written."""
        wanted = self.manifest()["sums"].get(name)
        try:
            content = (self.path / name).read_bytes()
            if checksum(content) != wanted:
                raise ValueError(CHANGED)
        except (OSError, ValueError) as error:
            raise damaged(self.path / name, error) from None
        return content

    def shard(self, number: int) -> Path:
        return self.path / "shards" / f"{number:07d}.safetensors"

    def missing(self, pictures: int, shard: int) -> list[int]:
        """Numbers of the shards that are not there."""
        return [number for number in range(-(-pictures // shard)) if not self.shard(number).is_file()]


def put(path: Path, content: bytes) -> None:
    """Write a file whole, on the disk before it has its name. Raises DiskFullError; leftovers of kills are removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with clear_when_full(path), unfinished(path) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.replace(file.name, path)
    sync_folder(path.parent)


def write_shard(path: Path, records: Sequence[Record]) -> None:
    """Write the records of a shard, in order of their index. Raises DataError for a field of two types or shapes."""
    records = sorted(records, key=lambda record: record.index)
    arrays = {
        "index": np.array([record.index for record in records], np.int64),
        "size": np.array([record.size for record in records], np.int64),
        "grid": np.array([record.grid for record in records], np.int64),
        "extent": np.array([record.extent for record in records], np.float64),
    }
    packed = []
    for name in sorted({name for record in records for name in record.fields}):
        found = [None if name not in record.fields else np.asarray(record.fields[name]) for record in records]
        known = [value for value in found if value is not None]
        if len({(value.dtype, value.ndim) for value in known}) > 1:
            raise DataError(f"{path.parent.parent.name}: field '{name}' has several types or numbers of axes")
        if known[0].dtype == bool:
            packed.append(name)
            flat = [np.packbits(value) for value in known]
        else:
            flat = [value.ravel() for value in known]
        arrays[f"{name}/values"] = np.concatenate(flat)
        lost = (-1,) * max(1, known[0].ndim)
        shapes = [lost if value is None else value.shape or (1,) for value in found]
        arrays[f"{name}/shape"] = np.array(shapes, np.int64)
        lengths = iter(map(len, flat))
        arrays[f"{name}/length"] = np.array([0 if value is None else next(lengths) for value in found], np.int64)
        sums = map(checksum, flat)
        arrays[f"{name}/{SUM}"] = np.array([0 if value is None else next(sums) for value in found], np.int64)
    notes = {"ids": [r.id for r in records], "drop": [r.drop for r in records], "packed": packed}
    notes[SUM] = of_heads({name: arrays[name] for name in sorted(arrays) if not name.endswith("/values")}, notes)
    put(path, safetensors.numpy.save(arrays, {NOTES: json.dumps(notes)}))


def of_heads(heads: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> int:
    """Check sum of everything of a shard but the values of its fields."""
    return checksum(*heads.values(), json.dumps([list(heads), notes]))


class Shard:
    """An open shard; fields are read where they are asked for, out of the mapped file, and compared with their sums.

    Raises DataError, also of `value` and `record`, for what is not as it was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.file = safe_open(path, framework="numpy")
            self.notes = json.loads(self.file.metadata()[NOTES])
            names = sorted(name for name in self.file.keys() if not name.endswith("/values"))  # noqa: SIM118 - no mapping
            heads = {name: self.file.get_tensor(name) for name in names}
            if self.notes.pop(SUM) != of_heads(heads, self.notes):
                raise ValueError(CHANGED)
            self.heads = {name: heads[name] for name in ("index", "size", "grid", "extent")}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise damaged(path, error) from None
        self.fields = [name.removesuffix("/shape") for name in names if name.endswith("/shape")]
        self.shapes = {name: heads[f"{name}/shape"] for name in self.fields}
        self.ends = {name: heads[f"{name}/length"].cumsum() for name in self.fields}
        self.sums = {name: heads[f"{name}/{SUM}"] for name in self.fields}
        self.rows = {int(index): row for row, index in enumerate(self.heads["index"])}

    def value(self, name: str, row: int) -> np.ndarray | None:
        """A field of a record; None where it has none."""
        shape = self.shapes[name][row]
        if (shape < 0).any():
            return None
        start = int(self.ends[name][row - 1]) if row else 0
        end = int(self.ends[name][row])
        try:
            if end > start:
                flat = self.file.get_slice(f"{name}/values")[start:end]
            else:  # slices may not be empty
                flat = self.file.get_tensor(f"{name}/values")[:0]
            if checksum(flat) != self.sums[name][row]:
                raise ValueError(CHANGED)
        except (SafetensorError, ValueError) as error:
            raise damaged(self.path, error) from None
        if name in self.notes["packed"]:
            flat = np.unpackbits(flat, count=int(shape.prod())).astype(bool)
        return flat.reshape(tuple(shape))

    def counts(self, name: str) -> np.ndarray:
        """Rows of a field [R,…] of every record, int64; 0 where it is dropped or has none."""
        kept = np.array([not reason for reason in self.notes["drop"]], bool)
        if name not in self.shapes:
            return np.zeros(len(kept), np.int64)
        return np.where(kept, self.shapes[name][:, 0].clip(min=0), 0)

    def record(self, row: int, names: Iterable[str] | None = None) -> Record:
        """The record of a row, with these fields (all where None)."""
        wanted = self.fields if names is None else [name for name in names if name in self.shapes]
        values = {name: self.value(name, row) for name in wanted}
        head = {name: tuple(part[row].tolist()) for name, part in self.heads.items() if name != "index"}
        return Record(
            int(self.heads["index"][row]), self.notes["ids"][row], drop=self.notes["drop"][row],
            fields={name: value for name, value in values.items() if value is not None}, **head,
        )  # fmt: skip


class Records:
    """The records of a finished map step; usable in worker processes, each of which opens the shards for itself."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.manifest = place.manifest()
        self.pictures, self.size = self.manifest["pictures"], self.manifest["shard"]
        self._open: dict[int, Shard] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.pictures

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def read(self, index: int, names: Iterable[str] | None = None) -> Record:
        """The record of the picture at `index` in the data set, with these fields (all where None).

        Raises DataError for a damaged shard.
        """
        shard = self._shard(index // self.size)
        return shard.record(shard.rows[index], names)

    def each(self, names: Iterable[str] | None = None) -> Iterator[Record]:
        """All records in order, also the dropped ones."""
        for number in range(-(-self.pictures // self.size)):
            shard = self._shard(number)
            yield from (shard.record(row, names) for row in range(len(shard.rows)))

    def rows(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a field [R,…] of all kept pictures, one after the other, and the picture of each row, int64 [R]."""
        kept = [record for record in self.each([name]) if record.keep and name in record.fields]
        if not kept:
            return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        owner = np.repeat([record.index for record in kept], [len(record.fields[name]) for record in kept])
        return np.concatenate([record.fields[name] for record in kept]), owner.astype(np.int64)

    def counts(self, name: str) -> np.ndarray:
        """Rows of a field [R,…] of every picture, int64 [pictures], without reading it; 0 for a dropped picture."""
        shards = (self._shard(number) for number in range(-(-self.pictures // self.size)))
        parts = [shard.counts(name) for shard in shards]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _shard(self, number: int) -> Shard:
        if self._process != os.getpid():  # a forked worker: file positions are not shared with its parent
            self._open, self._process = {}, os.getpid()
        if number not in self._open:
            if len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[number] = Shard(self.place.shard(number))
        return self._open[number]


def summary(place: Place, pictures: int, shard: int, counted: str | None) -> dict[str, Any]:
    """Counts over all shards of a map step, for its manifest and for people.

    kept, dropped (by reason), bytes on disk; with `counted`, a field [R,…]: how many R a kept picture has.
    """
    dropped: Counter[str] = Counter()
    regions: list[int] = []
    for number in range(-(-pictures // shard)):
        found = Shard(place.shard(number))
        dropped.update(filter(None, found.notes["drop"]))
        if counted in found.shapes:
            kept = np.array([not reason for reason in found.notes["drop"]])
            regions += found.counts(counted)[kept].tolist()
    size = sum(path.stat().st_size for path in (place.path / "shards").iterdir())
    facts = {"pictures": pictures, "shard": shard, "kept": pictures - dropped.total(), "dropped": dict(dropped)}
    if regions:
        facts["regions"] = {"mean": sum(regions) / len(regions), "least": min(regions), "most": max(regions)}
    return {**facts, "bytes": size}


class Arrays(Mapping[str, np.ndarray]):
    """The named arrays of a finished reduce step. Raises DataError for a damaged file."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self._arrays = safetensors.numpy.load(place.content(TABLE))

    def __getitem__(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)


class Weights:
    """The weights of a finished fit step."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def state(self) -> dict[str, Any]:
        """Tensors by name, on the CPU. Raises DataError for a damaged file."""
        from safetensors.torch import load

        return load(self.place.content(WEIGHTS))


def damaged(path: Path, error: Exception) -> DataError:
    """The error for a file that is not what was written. It is removed, so that the next start makes it anew; one that
    the system does not give (OSError) stays."""
    if isinstance(error, OSError):
        return DataError(f"{path}: cannot be read ({error.strerror or error}); delete it, so that it is made again")
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
    return DataError(f"{path}: cannot be read ({error}); it is removed, and the same command makes it again")


@contextlib.contextmanager
def told() -> Iterator[None]:
    """A damaged file is a line."""
    try:
        yield
    except DataError as error:
        log.warning("%s", error)


def clear(place: Place) -> None:
    """Remove what killed processes left half written."""
    for folder in (place.path, place.path / "shards"):
        for path in {part.with_name(part.name.partition(".part-")[0]) for part in folder.glob("*.part-*")}:
            remove_leftovers(path)
