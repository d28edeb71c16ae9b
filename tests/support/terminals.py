"""A terminal for tests: commands run in a pseudo-terminal, and what a user would have seen comes back."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Sequence
from pathlib import Path

from tests.support.processes import Program

CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def in_terminal(command: Sequence[str], folder: Path, columns: int = 110) -> tuple[int, str]:
    """(exit code, everything that was written) of a Python program in a pseudo-terminal."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    program = Program(command, cwd=folder, env=environment, out=os.ttyname(slave), err=os.ttyname(slave))
    parts: list[bytes] = []

    def read() -> None:
        while True:
            try:
                part = os.read(master, 65536)
            except OSError:  # the last process that had it is gone
                return
            if not part:
                return
            parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    code = program.wait(timeout=280)
    os.close(slave)  # it was held open until the program had it
    reader.join(timeout=10)
    os.close(master)
    return code, b"".join(parts).decode(errors="replace")


def rows(written: str) -> list[str]:
    """What stood on a line at any time, without colours: bars as they were drawn, and printed lines, in their order."""
    plain = CONTROL.sub("", written)
    return [row.rstrip() for row in re.split(r"[\r\n]+", plain) if row.strip()]


def bars(written: str) -> list[str]:
    """The rows that are bars."""
    return [row for row in rows(written) if "━" in row and not row.startswith(("┃", "┏", "┡", "└", "├", "│"))]
