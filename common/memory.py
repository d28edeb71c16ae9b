"""How much memory is free, where the system says so."""

from contextlib import suppress
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")


def free() -> int | None:
    """Bytes that a process can still take on this machine and in its container; None where nobody says."""
    found = []
    with suppress(OSError, ValueError, IndexError, StopIteration):
        line = next(line for line in MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
        found.append(int(line.split()[1]) * 1024)
    with suppress(OSError, ValueError):  # "max": no limit
        limit = int((GROUP / "memory.max").read_text())
        found.append(limit - int((GROUP / "memory.current").read_text()))
    return min(found, default=None)
