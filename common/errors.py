"""Errors that are the user's to mend: one clear line each, exit code 2, no traceback.

The line names the key or the file, the value that was found, the rule, and what to do.
"""

import difflib
import signal
from collections.abc import Iterable
from typing import Any


class LabelfreeError(ValueError):
    """Base of all errors that `run.py` prints as one line and ends with exit code 2."""


class ConfigError(LabelfreeError):
    """A key, a word or a combination of settings that cannot be run."""


class DataError(LabelfreeError):
    """A folder, a picture or a label that breaks a rule of the data format."""


class WeightsError(LabelfreeError):
    """Backbone weights that are missing, or that belong to another network."""


class CheckpointError(LabelfreeError):
    """A checkpoint that is missing, cut off, or of another method or config."""


class DiskFullError(OSError, LabelfreeError):
    """A file that could not be written because there is no room; the one before it is as it was."""

    def __init__(self, path: object, error: OSError) -> None:
        super().__init__(error.errno, error.strerror)
        self.filename = str(path)

    def __str__(self) -> str:
        return (
            f"{self.filename}: cannot be written ({self.strerror}); nothing that was written before is lost. Make "
            "room, then the same command goes on"
        )


class TrainingError(LabelfreeError):
    """A training that cannot go on as it is: its numbers are not finite any more."""


AGAIN = 85
"""Exit code of a run that SIGUSR1 stopped: start the same command again."""


def stop_code(signum: int) -> int:
    """The exit code of a process that a signal asked to stop."""
    return AGAIN if signum == signal.SIGUSR1 else 128 + signum


class Stopped(BaseException):
    """A run that ended because a signal asked it to, no error; `code` is the exit code. The same command goes on.

    Like KeyboardInterrupt no `Exception`: the handler raises it wherever the process is, also inside code that takes
    every Exception for a picture that cannot be read, a user's own data set among it.
    """

    def __init__(self, signum: int, step: int, saved: bool) -> None:
        self.code = stop_code(signum)
        where = f"saved at step {step}" if saved else f"at step {step}, to go on from the last checkpoint"
        super().__init__(f"stopped by {signal.Signals(signum).name}, {where}; the same command goes on")


def one_of(key: str, value: Any, known: Iterable[Any]) -> None:
    """Raises ConfigError where `value`, that of `key`, is none of the known ones."""
    if value not in (known := tuple(known)):
        raise ConfigError(f"{key}={value}: not one of {', '.join(map(str, known))}")


def did_you_mean(word: str, known: Iterable[str], listed_by: str = "") -> str:
    """A hint that ends an error line: the nearest valid names, or all of them where none is near.

    listed_by: the command that prints them, named where they are too many for a line.
    """
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if near:  # others only where they are about as near as the first
        first = similarity(word, near[0])
        near = [name for name in near if similarity(word, name) > first - 0.08]
    if not near:  # `lr` should find `optim.head.lr`
        near = [name for name in known if name.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]][:3]
    if len(word) >= 3:  # `coco` should find `cocostuff27`
        near = list(dict.fromkeys([*near, *(name for name in known if name.startswith(word))]))[:3]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return (
        f"known: {', '.join(known)}"
        if len(known) <= 30
        else (f"{len(known)} names are known" + (f", `{listed_by}` prints them" if listed_by else ""))
    )


def similarity(one: str, two: str) -> float:
    """How alike two names are, 0..1."""
    return difflib.SequenceMatcher(None, one, two).ratio()
