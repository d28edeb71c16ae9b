"""`data.cache`: every picture of a split decoded and resized once, before the first step, then only copied.

disk: a file in `cache.dir` that later runs find again. ram: the same file in the memory file system, shared by all
processes of a machine and removed at the end. The file is named after a fingerprint of the list, the files (size and
time of change), the label table, the geometry and the decoder, so a stale one is not even opened.
Several processes: rank 0 writes; a machine that cannot see its file writes its own.
"""

import atexit
import contextlib
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed as dist
from PIL import Image, features
from torch.utils.data import DataLoader, Dataset

from common import distributed
from common.errors import ConfigError, DataError, LabelfreeError
from common.files import size_text
from datamodules.base import shapes
from datamodules.base.dataset import fitted, read_pair, take_foreign
from datamodules.base.decoded import COLUMNS, DecodedStore, DecodedWriter
from datamodules.base.label_map import Foreign
from datamodules.base.transforms import FIXED_CROPS, Geometry
from datamodules.files.reading import UnreadableError

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when reading or resizing changes, so that files of before are not found any more."""
MEASURED, READ = 5000, 32
"""Pictures measured for the announced size: by their first bytes, or, where that is impossible, by reading them."""
TURN = 10.0
"""Seconds between two signs of life to the waiting ranks, whose collectives would time out otherwise."""
PROGRESS = 30.0
"""Seconds between lines about a long build."""


@dataclass(frozen=True)
class Plan:
    """What is to be decoded, and where it goes."""

    name: str
    split: str
    source: Any
    geometry: Geometry
    has_labels: bool
    mode: str
    folder: Path
    workers: int = 0

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of everything the bytes depend on. Raises ConfigError for a source that cannot tell."""
        if not hasattr(self.source, "fingerprint"):
            raise ConfigError(
                f"data.cache={self.mode}: data={self.name} cannot tell when its pictures change (its source has no "
                f"fingerprint()), so a cache could go stale; set data.cache=none"
            )
        geometry = asdict(self.geometry) | {"flip_p": 0.0}  # flips come later
        decoder = [FORMAT, Image.__version__, features.version("jpg"), features.version("zlib")]
        facts = [self.source.fingerprint(), geometry, self.has_labels, decoder]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}-{self.split}-{self.fingerprint[:20]}.decoded"

    @property
    def items(self) -> int:
        return len(self.source) * self.geometry.crops

    def find(self) -> DecodedStore | None:
        """The finished store, if there is one."""
        return DecodedStore.find(self.path, self.fingerprint)

    def needed(self) -> tuple[int, bool]:
        """Bytes of the file, and whether they are exact or an estimate from some of the pictures."""
        depth = 4 if self.has_labels else 3
        if self.geometry.crop in FIXED_CROPS:
            height, width = self.geometry.kept_size(1, 1)
            return self.items * (depth * height * width + 8 * COLUMNS), True
        measure = getattr(self.source, "size", None)
        step = max(1, -(-len(self.source) // (MEASURED if measure else READ)))
        pixels = []
        for index in range(0, len(self.source), step):
            with contextlib.suppress(UnreadableError):
                size = measure(index) if measure else self.source.read(index)[0].shape[:2]
                if shapes.is_long(self.geometry, *size):
                    continue
                height, width = self.geometry.kept_size(*size)
                pixels.append(height * width)
        each = sum(pixels) / max(1, len(pixels))
        return int(self.items * (depth * each + 8 * COLUMNS)), step == 1


def provide(plan: Plan) -> DecodedStore:
    """The store of a plan, made where there is none. A collective: all ranks call it at the same place.

    Raises ConfigError, before anything is written, where the disk (or memory) cannot take it, and DataError where a
    label or too full a disk stops the work: on every rank.
    """
    own = plan.find()
    leader = distributed.rank() == 0
    together(build(plan) if leader and own is None else None)
    own = own or plan.find()
    together(build(plan) if distributed.local_rank() == 0 and own is None else None)
    own = own or plan.find()
    together(None if own is not None else _lost(plan))
    return own


def _lost(plan: Plan) -> Iterator[None]:
    raise DataError(
        f"data.cache={plan.mode}: {plan.path} was written but is not to be seen by every process of its machine"
    )
    yield


def together(work: Iterator[None] | None) -> None:
    """Runs the work of those ranks that have some while the others wait; an error of one is raised on all.

    A collective. work: does its part between two yields, None for a rank that has nothing to do.
    """
    while True:
        state: str | Exception = "idle"
        if work is not None:
            end = time.monotonic() + TURN
            try:
                for _ in work:
                    if time.monotonic() > end:
                        state = "working"
                        break
                else:
                    work = None
            except LabelfreeError as error:
                state = error
            except Exception as error:
                if not distributed.active():
                    raise
                state = RuntimeError(f"{type(error).__name__}: {error}")
        states = [state]
        if distributed.active():
            states = [state] * distributed.world_size()
            dist.all_gather_object(states, state)
        for found in states:
            if isinstance(found, Exception):
                raise found
        if "working" not in states:
            return


def build(plan: Plan) -> Iterator[None]:
    """Writes the file, a step for each picture. Raises ConfigError, DataError."""
    _make_folder(plan)
    needed, exact = plan.needed()
    free = shutil.disk_usage(plan.folder).free
    about = "" if exact else "about "
    if needed > free:
        other = "data.cache=disk or none" if plan.mode == "ram" else "cache.dir to a larger disk, or data.cache=none"
        raise ConfigError(
            f"data.cache={plan.mode}: the {plan.items} decoded pictures of '{plan.split}' need {about}"
            f"{size_text(needed)}, but {plan.folder} has {size_text(free)} free; set {other}"
        )
    log.info(
        "data.cache=%s: decoding %d pictures of %s '%s' once into %s, %s%s (%s free)",
        plan.mode, plan.items, plan.name, plan.split, plan.path, about, size_text(needed), size_text(free),
    )  # fmt: skip
    _name_older(plan)
    if plan.path.exists():
        log.warning("%s is not what was written (cut or changed); it is made anew", plan.path)
    foreign: Foreign = {}
    said = time.monotonic()
    try:
        with DecodedWriter(plan.path, plan.fingerprint) as writer:
            for picture, (crops, found) in enumerate(_decoded(plan)):
                if isinstance(crops, UnreadableError):
                    for _ in range(plan.geometry.crops):
                        writer.add_broken(crops)
                elif isinstance(crops, LabelfreeError):
                    raise crops
                else:
                    for crop in crops:
                        writer.add(*crop)
                foreign |= found
                if time.monotonic() - said > PROGRESS:
                    said = time.monotonic()
                    log.info("data.cache=%s: %d of %d pictures", plan.mode, picture + 1, len(plan.source))
                yield
            writer.finish(foreign)
    except OSError as error:
        raise DataError(
            f"data.cache={plan.mode}: {plan.path} cannot be written ({error.strerror or error}); it is gone again; "
            "set cache.dir to a larger disk, or data.cache=none"
        ) from error


class _Pictures(Dataset):
    """Picture i -> all its resized crops, or the error instead; and the foreign label values of its file."""

    def __init__(self, plan: Plan) -> None:
        self.source, self.geometry, self.has_labels = plan.source, plan.geometry, plan.has_labels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, picture: int) -> tuple[list | LabelfreeError, Foreign]:
        try:
            image, label = read_pair(self.source, picture, self.has_labels)
            crops = [
                (*fitted(self.source, picture, self.geometry, image, label, crop), image.shape[:2])
                for crop in range(self.geometry.crops)
            ]
        except LabelfreeError as error:
            return error, {}
        return crops, take_foreign(self.source)


def _decoded(plan: Plan) -> Iterator[tuple[list | LabelfreeError, Foreign]]:
    """All pictures in order, read by the loader's workers."""
    yield from DataLoader(_Pictures(plan), batch_size=None, num_workers=plan.workers, collate_fn=_as_it_is)


def _as_it_is(item: Any) -> Any:
    return item


def _make_folder(plan: Plan) -> None:
    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache.dir={plan.folder}: cannot be made ({error.strerror}); name a folder that can be written to"
        ) from error


def _name_older(plan: Plan) -> None:
    older = [path for path in plan.folder.glob(f"{plan.name}-{plan.split}-*.decoded") if path != plan.path]
    if plan.mode == "disk" and older:
        size = size_text(sum(path.stat().st_size for path in older))
        log.info("%s holds %s of other caches of this split; delete what no run uses", plan.folder, size)


# ---- the memory file system ----

_memory: dict[str, Any] = {}


def memory_folder() -> Path:
    """The folder of this run in the memory file system (else among temporary files), the same on all ranks.

    Its files go when the process that made it ends; what killed processes left behind goes now. A collective.
    """
    if "folder" not in _memory:
        chosen = [str(_new_memory_folder())] if distributed.rank() == 0 else [""]
        if distributed.active():
            dist.broadcast_object_list(chosen, 0)
        _memory["folder"] = Path(chosen[0])
        _memory["lock"] = _hold(_memory["folder"].with_suffix(".lock"))
        atexit.register(_remove_memory_folder, os.getpid())
    return _memory["folder"]


def _new_memory_folder() -> Path:
    shared = Path("/dev/shm")
    parent = shared if os.access(shared, os.W_OK) else Path(tempfile.gettempdir())
    prefix = f"labelfree-{os.getuid()}-"
    for lock in parent.glob(f"{prefix}*.lock"):
        with contextlib.suppress(OSError), lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
            lock.unlink()
    return parent / f"{prefix}{secrets.token_hex(6)}"


def _hold(lock: Path) -> Any:
    """An open file whose lock lasts as long as this process and the readers it forks: the folder is in use."""
    while True:
        file = lock.open("ab")
        fcntl.flock(file, fcntl.LOCK_SH)
        if lock.exists():  # else another process took it for a leftover between the two lines
            return file
        file.close()


def _remove_memory_folder(owner: int) -> None:
    if os.getpid() == owner and "folder" in _memory:
        shutil.rmtree(_memory["folder"], ignore_errors=True)
        _memory["folder"].with_suffix(".lock").unlink(missing_ok=True)
