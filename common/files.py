"""Files of ours: written whole or not at all, and the folder that keeps what can be computed again.

A reader, and the next start after a kill, see the old file or the new one.
"""

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import CheckpointError, DiskFullError
from common.names import written

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room: on the disk, in the user's quota, or for a file of this size."""
MARK = ".labelfree"
"""A file in every folder of pictures that this project writes: they are nobody's pictures to train on."""


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary neighbour to write to, which takes the place of `path` at the end; removed where anything fails.

    It is on the disk before it is renamed, so that a crash of the machine does not leave an empty file either.
    Raises DiskFullError where there is no room; other errors are passed on.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with clear_when_full(path):
            yield temporary
            with temporary.open("rb") as handle:
                os.fsync(handle.fileno())
            temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def clear_when_full(path: Path) -> Iterator[None]:
    """Errors that say that there is no room become a DiskFullError that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL and not isinstance(error, DiskFullError):
            raise DiskFullError(path, error) from None
        raise


def sync_folder(folder: Path) -> None:
    """Make a rename last through a crash of the machine, where the system can."""
    with suppress(OSError):  # Windows, and some network file systems, cannot
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def keep_as(path: Path, other: Path) -> None:
    """Give the content of `path` the name `other` too, at no cost; `path` stays what and where it is.

    A file system without hard links gives it the other name only: `path` is missing until it is written anew.
    """
    temporary = other.with_name(f".{other.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
    except OSError:
        path.replace(other)
        return
    temporary.replace(other)


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed process left half written by `whole`; nobody else may be writing into the folder."""
    for path in folder.glob(".*.*"):
        if path.is_file() and path.suffix[1:].isdecimal():
            path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, UTF-8, line ends as they are; bytes of names that are no UTF-8 as backslash escapes."""
    with whole(path) as temporary:
        temporary.write_text(written(text), encoding="utf-8", newline="")


def make_output(folder: Path) -> None:
    """Make a folder for pictures of ours, with the mark of such folders, see MARK."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / MARK
    if not mark.exists():
        write_text(mark, "Written by Labelfree. Folders with this file are not read as pictures.\n")


def copy_whole(source: str | Path, target: str | Path) -> None:
    """Copy a file so that `target` is never seen half written."""
    with whole(target) as temporary:
        shutil.copyfile(source, temporary)


@contextmanager
def unfinished(path: Path, token: str | None = None) -> Iterator[BinaryIO]:
    """A new file beside `path` for long work, open for writing; at the end it is removed unless it was renamed.

    Its name ends with `token` (by default one by chance), so that two runs that make the same file do not meet. A lock
    marks it as somebody's work: leftovers of killed processes have none and are removed first.
    """
    remove_leftovers(path)
    part = path.with_name(f"{path.name}.part-{token or secrets.token_hex(4)}")
    file = part.open("wb")
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file
    finally:
        with suppress(OSError):  # a full disk: what is still in the buffer cannot be written either
            file.close()
        part.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Deletes unfinished files of `path` that no living process writes."""
    for part in path.parent.glob(f"{path.name}.part-*"):
        with suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def cache_folder(cfg: Any) -> Path:
    """`cache.dir`, or labelfree in the user's own cache folder; the folder may not exist yet."""
    chosen = cfg.cache.get("dir") if cfg.get("cache") else None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labelfree"


def size_text(count: float) -> str:
    """Bytes for people: 912 B, 3.4 MB, 73.5 GB (powers of 1000, as disks are sold)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def expect_checkpoint(path: Path, key: str = "ckpt") -> None:
    """Raises CheckpointError, naming the word `key`, where there is no such file, or one that may not be read."""
    if not path.is_file():
        raise CheckpointError(
            f"{key}={path}: {no_file(path)}; a run keeps its own under checkpoints/last.ckpt and best.ckpt"
        )
    if not os.access(path, os.R_OK):
        raise CheckpointError(f"{key}={path}: may not be read by you; change its rights, or name a copy")


def no_file(path: Path) -> str:
    """Why a path is not the file that was asked for, in words."""
    return "is a folder, and a file is wanted" if path.is_dir() else "no such file"


def no_folder(path: Path) -> str:
    """Why a path is not the folder that was asked for, in words."""
    return "is a file, and a folder is wanted" if path.is_file() else "there is no such folder"
