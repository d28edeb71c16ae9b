"""What is found below a folder of pictures: plain files, no leftovers of other programs, no output of this project."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import ConfigError, DataError
from common.files import MARK
from common.names import shown
from datamodules.files.opening import ENDINGS
from datamodules.files.reading import is_picture

log = logging.getLogger(__name__)

LEFTOVERS = frozenset(
    (
        "__macosx",  # zip files made on a Mac
        "@eadir", "@tmp", "#recycle", "#snapshot",  # NAS of Synology
        "@__thumb", "@recycle", "@recently-snapshot", "@transcode",  # of QNAP
        "$recycle.bin", "recycler", "recycled", "system volume information",  # Windows
        "lost+found", "__pycache__",
    )
)  # fmt: skip
"""Folders, in small letters, that programs make for themselves, with thumbnails and deleted pictures in them."""
SYSTEM_FILES = frozenset(("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "classes.json"))
"""Files of that kind, and one of our own layouts, not worth a word."""
RUN_GROUPS = ("method", "data", "backbone", "trainer", "evaluation")
"""Top keys that the config.yaml of a run has, and hardly another one of this name."""
NAMED = 6
"""Endings named in the line on files that are left out."""
told: set[str] = set()
"""What this process has said of folders."""


@dataclass
class Found:
    """Relative paths with "/", sorted, and how many files of other endings were passed by."""

    names: list[str] = field(default_factory=list)
    others: Counter = field(default_factory=Counter)

    @property
    def left_out(self) -> str:
        """`3 .heic, 1 .txt`; empty where nothing was left out."""
        parts = [f"{count} {ending}" for ending, count in self.others.most_common(NAMED)]
        rest = len(self.others) - NAMED
        return ", ".join(parts) + (f" and {rest} other endings" if rest > 0 else "")


def files_below(folder: str | Path, wanted: Callable[[str], bool]) -> list[str]:
    """Relative paths, with "/", of the wanted files of `walk`, sorted. `wanted` sees the file's own name."""
    return walk(folder, wanted).names


def pictures(folder: str | Path) -> list[str]:
    """The pictures below a folder, as `files_below`; files of other endings are counted in one line of the log."""
    found = walk(folder, is_picture)
    if found.others:
        _say(log.info, f"{folder}: {len(found.names)} pictures; files of other kinds are left out: {found.left_out}")
    return found.names


def walk(folder: str | Path, wanted: Callable[[str], bool]) -> Found:
    """The wanted files at any depth. Links are followed, and each folder is entered once.

    Left out: hidden files and folders, `LEFTOVERS`, folders with output of this project (`is_output`), and what is no
    plain file. A folder that cannot be looked into is named in a warning, and so is output and what is no plain file.
    """
    found, entered = Found(), set()
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        path = os.path.join(folder, inside) if inside else str(folder)
        real = os.path.realpath(path)
        if real in entered:
            continue
        entered.add(real)
        if inside and is_output(path):
            _say(log.warning, f"{path}: holds output of this project and is not read as pictures")
            continue
        folders = []
        for name, kind in _entries(path):
            relative = f"{inside}/{name}" if inside else name
            if kind == "folder":
                if not is_leftover(name):
                    folders.append(relative)
            elif kind == "other":
                if wanted(name):
                    _say(log.warning, f"{path}/{name}: is no plain file (a pipe, a socket or a device); skipped")
            elif wanted(name):
                found.names.append(relative)
            elif not name.startswith(".") and name.lower() not in SYSTEM_FILES:
                ending = os.path.splitext(name)[1].lower()
                found.others[shown(ending) or "without an ending"] += 1
        waiting += reversed(folders)
    found.names.sort()
    return found


def _say(how: Callable[[str, str], None], line: str) -> None:
    """A line on a folder, once: it is walked through for several purposes."""
    if line not in told:
        told.add(line)
        how("%s", shown(line))


def _entries(path: str) -> Iterator[tuple[str, str]]:
    """(name, file | folder | other) of what lies in a folder, in the order of names."""
    try:
        with os.scandir(path) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        _say(log.warning, f"{path}: cannot be looked into ({error.strerror}); its pictures are left out")
        return
    for entry in listed:
        try:
            kind = "folder" if entry.is_dir() else "file" if entry.is_file() else "other"
            if kind == "other" and entry.is_symlink() and not os.path.exists(entry.path):
                kind = "file"  # a link to nothing, which is named as unreadable when it is read
        except OSError:  # a link into itself, or a disk that fails
            kind = "file"
        yield entry.name, kind


def is_leftover(name: str) -> bool:
    """True for the name of a folder that is never entered."""
    return name.startswith(".") or name.lower() in LEFTOVERS


def is_output(folder: str | Path) -> bool:
    """True for a folder that this project wrote: a run's, or one with the mark of our other outputs."""
    if os.path.exists(os.path.join(folder, MARK)):
        return True
    stored = os.path.join(folder, "config.yaml")
    if not os.path.isfile(stored):
        return False
    try:
        with open(stored, encoding="utf-8") as handle:
            text = handle.read(1 << 20)
    except (OSError, ValueError):
        return False
    return all(re.search(rf"^{group}:", text, re.MULTILINE) for group in RUN_GROUPS)


def reads(folder: str | Path, target: str | Path) -> bool:
    """True where what is written at `target` would be found below `folder`."""
    folder, target = Path(folder).resolve(), Path(target).resolve()
    if target != folder and folder not in target.parents:
        return False
    return not any(is_leftover(part) for part in target.relative_to(folder).parts)


def expect_apart(folders: list[tuple[str, Path]], key: str, target: str | Path) -> None:
    """Raises ConfigError where what is written at `target` would be read as pictures by the next start.

    folders: where pictures are looked for, with the keys that name them. key: that which names `target`.
    """
    for named, folder in folders:
        if reads(folder, target):
            raise ConfigError(
                f"{key}={target}: lies in {named}={folder} and would be read as pictures; name another folder"
            )


def no_pictures(key: str, folder: Path, where: str) -> DataError:
    """What is wrong with a folder without pictures. where: the depth that was looked at."""
    return DataError(
        f"{key}: no pictures found in {folder} ({where}); looked for files ending in {', '.join(ENDINGS)}, in small or "
        "capital letters"
    )
