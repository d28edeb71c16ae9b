"""Files of ours: written whole or not at all, and the folder that keeps what can be computed again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write to, which takes the place of `path` at the end: it is never seen half written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    temporary.replace(path)


def cache_folder(cfg: Any) -> Path:
    """`cache.dir`, or labelfree in the user's own cache folder; the folder may not exist yet."""
    chosen = cfg.cache.get("dir") if cfg.get("cache") else None
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "labelfree"
