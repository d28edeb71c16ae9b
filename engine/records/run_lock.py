"""A run folder belongs to one process, as long as it trains there."""

import errno
import fcntl
import logging
from pathlib import Path
from typing import Any

from common.errors import ConfigError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
held: dict[Path, Any] = {}
"""Lock files that this process holds, open until it ends."""


def hold(path: Path) -> None:
    """Take the run folder for this process, until it ends. Raises ConfigError where another one has it."""
    path.mkdir(parents=True, exist_ok=True)
    former = held.pop(path.resolve(), None)
    if former is not None:
        former.close()
    handle = (path / LOCK_FILE).open("w")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            handle.close()
            raise ConfigError(
                f"run.name={path.name}: another process trains in {path}; wait for it, stop it, or choose another name"
            ) from None
        log.warning("%s cannot be locked here (%s): start no second process with this run.name", path, error.strerror)
    held[path.resolve()] = handle


def in_use(path: Path) -> bool:
    """Whether another process trains in a run folder now; False as well where the file system has no locks."""
    try:
        handle = (path / LOCK_FILE).open("r+")
    except OSError:
        return False
    with handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in (errno.EACCES, errno.EAGAIN)
    return False
