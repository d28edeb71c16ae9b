"""Files below a folder: links are followed, each folder is entered once, other programs' leftovers are left out."""

import os
from collections.abc import Callable
from pathlib import Path


def files_below(folder: str | Path, wanted: Callable[[str], bool]) -> list[str]:
    """Relative paths, with "/", of the wanted files below a folder, sorted. `wanted` sees the file's own name."""
    found, entered = [], set()
    for path, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__MACOSX")
        found += [Path(path, name).relative_to(folder).as_posix() for name in names if wanted(name)]
    return sorted(found)
