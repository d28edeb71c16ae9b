"""What a command says to a terminal or a pipe: no name does harm there, and nothing is said where nobody reads."""

import logging
import os
import select
import sys
from collections.abc import Callable

from common.names import Lines


def prepare() -> None:
    """Make standard output, standard error and the handlers of the log take any name; see `names.shown`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr:
            handler.setFormatter(Lines("%(message)s"))


def finished(command: Callable[[], int]) -> int:
    """Run a command to its exit code; 0 without a word where the reader of its output has gone, as `head` does."""
    try:
        code = command()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        code = 0
    try:
        sys.stdout.flush()
    except OSError as error:
        _let_go()
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"error: standard output cannot be written ({error.strerror}); make room\n")
            return 2
    return code


def _reader_is_gone() -> bool:
    watch = select.poll()
    watch.register(sys.stdout.fileno(), select.POLLOUT)
    return any(event & select.POLLERR for _, event in watch.poll(0))


def _let_go() -> None:
    """What is left for standard output goes nowhere, so that the end of the process does not stumble over it."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
