"""`backbone.cache_features`: frozen features of every picture of a split, in half precision, in one memory-mapped file.

For geometries without chance only: then the backbone sees each picture once, before the first step, and never again.
A file is named after everything that its numbers depend on and gets its name when it is whole; its json comes last. So
a partial or stale one is never read. Behind the rows stand their check sums: a picture whose row the disk gives back
changed goes through the backbone again. Several processes write their parts of one file, which all of them must see.
"""

import contextlib
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.errors import ConfigError, DataError
from common.files import remove_leftovers, size_text, unfinished
from common.formats.sums import checksum, read_sealed, write_sealed
from models.backbone import Features

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when the layout changes, so that files of before are not found any more."""
SUM_BYTES = 8
"""Of the check sum of a row, int64."""
PROGRESS = 30.0
"""Seconds between lines about a long build."""


@dataclass(frozen=True)
class Layout:
    """Shapes of one picture's features: `levels` [C,h,w] each, and `cls` channels of the class token (0: none)."""

    levels: tuple[tuple[int, int, int], ...]
    cls: int = 0
    prefix: int = 0

    @classmethod
    def of(cls, features: Features) -> "Layout":
        """That of a batch of features."""
        token = 0 if features.cls is None else features.cls.shape[1]
        return cls(tuple(tuple(level.shape[1:]) for level in features.levels), token, features.prefix)

    @property
    def numbers(self) -> int:
        """Numbers of one picture."""
        return sum(int(np.prod(shape)) for shape in self.levels) + self.cls

    def pack(self, features: Features) -> Tensor:
        """A batch of features -> float16 [B,numbers] on the CPU."""
        parts = [level.flatten(1) for level in features.levels]
        if self.cls:
            parts.append(features.cls)
        return torch.cat(parts, dim=1).half().cpu()

    def unpack(self, rows: Tensor) -> Features:
        """[B,numbers] -> float32 features, as the backbone gives them but for attention and qkv."""
        sizes = [int(np.prod(shape)) for shape in self.levels]
        parts = rows.float().split([*sizes, *([self.cls] if self.cls else [])], dim=1)
        levels = [part.unflatten(1, shape) for part, shape in zip(parts, self.levels, strict=False)]
        return Features(levels, cls=parts[-1] if self.cls else None, prefix=self.prefix)


class FeatureStore:
    """A finished file. Raises OSError or ValueError where there is none, or one that is cut or changed."""

    def __init__(self, path: Path) -> None:
        facts = read_sealed(facts_path(path))
        self.path, items = path, facts["items"]
        self.layout = Layout(tuple(tuple(shape) for shape in facts["levels"]), facts["cls"], facts["prefix"])
        self.missing = frozenset(facts["missing"])
        expected = items * (self.layout.numbers * 2 + SUM_BYTES)
        if path.stat().st_size != expected:
            raise ValueError(f"{path}: {path.stat().st_size} bytes instead of {expected}")
        self.rows = np.memmap(path, dtype=np.float16, mode="r", shape=(items, self.layout.numbers))
        self.sums = _sums(path, items, self.layout.numbers)
        if checksum(self.sums) != facts["of_sums"]:
            raise ValueError(f"{path}: changed since it was written")

    @classmethod
    def find(cls, path: Path) -> "FeatureStore | None":
        """The store of a file; None where there is no whole one."""
        try:
            return cls(path)
        except (OSError, ValueError, KeyError):
            return None

    def features(
        self, indices: Tensor, device: torch.device, again: Callable[[list[int]], Features] | None = None
    ) -> Features:
        """Features of the items `indices` [B], float32 on `device`.

        again: from rows of the batch to features made anew, for those that are not what was written.

        Raises DataError for a picture that could not be read when the file was made and can be read now, and, without
        `again`, for one that is not what was written.
        """
        wanted = indices.tolist()
        if not self.missing.isdisjoint(wanted):
            raise DataError(
                f"backbone.cache_features: picture {next(i for i in wanted if i in self.missing)} could not be read "
                f"when {self.rows.filename} was made; delete that file, so that it is made again"
            )
        rows = self.rows[wanted]
        changed = [place for place, item in enumerate(wanted) if checksum(rows[place].data) != self.sums[item]]
        if changed:
            items = ", ".join(str(wanted[place]) for place in changed)
            said = f"{self.path}: features of picture {items} are not what was written"
            if again is None:
                raise DataError(f"{said}; delete that file, so that it is made again")
            log.warning("%s; they are computed again", said)
            rows[changed] = self.layout.pack(again(changed)).numpy()
            self._mend({wanted[place]: rows[place] for place in changed})
        return self.layout.unpack(torch.from_numpy(rows).to(device, non_blocking=True))

    def _mend(self, rows: dict[int, np.ndarray]) -> None:
        """Write rows anew, where they are what the file held and it can be written to."""
        with contextlib.suppress(OSError), self.path.open("r+b", buffering=0) as file:
            for item, row in rows.items():
                if checksum(row.data) == self.sums[item]:
                    os.pwrite(file.fileno(), row.data, item * row.nbytes)


def _sums(path: Path, items: int, numbers: int) -> np.ndarray:
    """Check sums of the rows of a file, int64 [items]; 0 for one that no rank wrote."""
    return np.fromfile(path, np.int64, items, offset=items * numbers * 2)


def name(*facts: str) -> str:
    """File name that depends on everything given (backbone, pictures, precision)."""
    return hashlib.sha256(json.dumps([FORMAT, *facts]).encode()).hexdigest()[:24] + ".features"


def facts_path(path: Path) -> Path:
    return path.with_suffix(".json")


def provide(
    path: Path,
    items: int,
    layout: Layout,
    batches: Iterable[tuple[Tensor, Features]],
    what: str,
    device: torch.device,
) -> FeatureStore:
    """The store at `path`, made from `batches` (item numbers [B], features) of this rank where there is none.

    `what` names the pictures in messages; `device` is that of the collectives.

    A collective: all ranks call it at the same place, each with its part of the items; items in no part are unreadable
    pictures. Raises ConfigError, before anything is written, where the disk cannot take the file, and DataError where
    it fills up later, a feature does not fit into float16, or a rank does not see the file: on every rank.
    """
    found, group = FeatureStore.find(path), Together(device)
    if group.agree(found is not None):
        return found
    if found is None and path.exists() and distributed.rank() == 0:
        log.warning("%s is not what was written (cut or changed); it is made anew", path)
    with contextlib.ExitStack() as stack:
        part = _begin_together(stack, group, path, items * (layout.numbers * 2 + SUM_BYTES), what)
        seen, trouble = _write(part, layout, batches, items, what)
        group.share(trouble)
        written = torch.cat(seen).to(device) if seen else torch.empty(0, dtype=torch.int64, device=device)
        present = distributed.gather_uneven(written)
        if distributed.rank() == 0:
            missing = sorted(set(range(items)) - set(present.tolist()))
            with part.open("rb") as file:
                os.fsync(file.fileno())
            part.replace(path)
            facts = {"items": items, "levels": layout.levels, "cls": layout.cls, "prefix": layout.prefix}
            of_sums = checksum(_sums(path, items, layout.numbers))
            write_sealed(facts_path(path), facts | {"missing": missing, "of_sums": of_sums})
        group.agree(True)  # nobody looks before it has its name
    store = FeatureStore.find(path)
    group.share(None if store is not None else _unseen(path))
    return store


def _key() -> str:
    return "backbone.cache_features=true"


def _unseen(path: Path) -> DataError:
    return DataError(
        f"{_key()}: {path} is not seen by every process; set cache.dir to a folder that all machines share"
    )


class Together:
    """What the ranks tell each other while they write."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def agree(self, here: bool) -> bool:
        """True where it holds on every rank."""
        return not distributed.anywhere(not here, self.device)

    def share(self, error: Exception | None) -> None:
        """Raises an error of any rank on all of them."""
        fine = self.agree(error is None)
        if error is not None:
            raise error
        if not fine:
            raise DataError(f"{_key()}: another process could not write its part; its own line says why")


def _begin_together(stack: contextlib.ExitStack, group: Together, path: Path, needed: int, what: str) -> Path:
    """The unfinished file, of the full length and one for all ranks; gone when the first rank's stack ends."""
    token = f"{int(distributed.broadcast(torch.tensor(secrets.randbits(31), device=group.device))):08x}"
    group.share(_begin(stack, path, token, needed, what) if distributed.rank() == 0 else None)
    part = path.with_name(f"{path.name}.part-{token}")
    group.share(None if part.is_file() else _unseen(part))
    return part


def _begin(stack: contextlib.ExitStack, path: Path, token: str, needed: int, what: str) -> Exception | None:
    """Asks the disk and makes an empty file of the full length; returns what went wrong."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        free = shutil.disk_usage(path.parent).free
        if needed > free:
            return ConfigError(
                f"{_key()}: features of the {what} need {size_text(needed)}, but {path.parent} has {size_text(free)} "
                "free; set cache.dir to a larger disk, or backbone.cache_features=false"
            )
        log.info("%s: %s once into %s, %s (%s free)", _key(), what, path, size_text(needed), size_text(free))
        stack.enter_context(unfinished(path, token)).truncate(needed)
    except OSError as error:
        return ConfigError(f"cache.dir={path.parent}: cannot be written to ({error.strerror}); name another folder")
    return None


def _write(
    part: Path, layout: Layout, batches: Iterable[tuple[Tensor, Features]], items: int, what: str
) -> tuple[list[Tensor], Exception | None]:
    """This rank's rows; returns the items written, and what went wrong."""
    seen: list[Tensor] = []
    width, said, count = layout.numbers * 2, time.monotonic(), 0
    try:
        with part.open("r+b", buffering=0) as file:
            for indices, features in batches:
                rows = layout.pack(features)
                if not rows.isfinite().all():
                    return seen, DataError(
                        f"{_key()}: a feature of the {what} is above 65,504, the largest number of float16; "
                        "set backbone.cache_features=false"
                    )
                for index, row in zip(indices.tolist(), rows.numpy(), strict=True):
                    os.pwrite(file.fileno(), row.data, index * width)
                    of_row = checksum(row.data).to_bytes(SUM_BYTES, "little")
                    os.pwrite(file.fileno(), of_row, items * width + index * SUM_BYTES)
                seen.append(indices.cpu())
                count += len(indices)
                if time.monotonic() - said > PROGRESS and distributed.rank() == 0:
                    said = time.monotonic()
                    log.info("%s: %d of %d", _key(), count * distributed.world_size(), items)
    except OSError as error:
        return seen, DataError(
            f"{_key()}: {part} cannot be written ({error.strerror or error}); it is gone again; set cache.dir to a "
            "larger disk, or backbone.cache_features=false"
        )
    return seen, None
