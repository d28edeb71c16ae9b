"""Files that are written whole or not at all: a reader, and the next start after a kill, see the old one or the new.

And the folder that keeps what can be computed again.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A temporary neighbour to write to, which takes the place of `path` at the end; removed where anything fails.

    It is on the disk before it is renamed, so that a crash of the machine does not leave an empty file either.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, UTF-8, line ends as they are."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def copy_whole(source: str | Path, target: str | Path) -> None:
    """Copy a file so that `target` is never seen half written."""
    with whole(target) as temporary:
        shutil.copyfile(source, temporary)


def cache_folder(cfg: Any) -> Path:
    """`cache.dir`, or labelfree in the user's own cache folder; the folder may not exist yet."""
    chosen = cfg.cache.get("dir") if cfg.get("cache") else None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labelfree"
