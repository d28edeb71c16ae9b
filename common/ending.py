"""How a command ends, whichever it is: an exit code, and one line where there is something to mend or to say."""

import errno
import logging
import signal
import sys
import threading
from collections.abc import Callable

from common.errors import DiskFullError, LabelfreeError, Stopped
from common.files import FULL
from common.names import shown

log = logging.getLogger("labelfree")

LOST_READER = (
    "data.workers: a process that reads pictures was killed, most often because memory ran out; lower data.workers or "
    "data.cache_mb (data.workers=0 reads in the run itself), then the same command goes on"
)
INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells expect it."""

_SICK = "the disk, or the machine that holds it, does not work as it should; once it does, the same command goes on"
_WAYS = {
    errno.EROFS: "name another place, or mount the disk so that it can be written to",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the link, or name another place",
    errno.ENOENT: "mend the name",
    errno.EBUSY: "something else holds it: a mount, or another program; name another place",
    errno.EMFILE: "too many files are open; raise the limit (ulimit -n), or set data.workers lower",
    errno.ENFILE: "too many files are open on this machine; end other programs, or set data.workers lower",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV, errno.EREMOTEIO), _SICK),
}


def line_of(error: OSError) -> str | None:
    """One line for what the system says of a file; None for an error that concerns none."""
    if isinstance(error, LabelfreeError):
        return str(error)
    if error.errno in FULL:
        return str(DiskFullError(error.filename or "a file", error))
    if error.filename is None and error.errno not in _WAYS and not isinstance(error, PermissionError):
        return None
    name = "a file" if error.filename is None else str(error.filename)
    said = (error.strerror or str(error) or "refused").lower()
    return f"{name}: {said}; {_WAYS.get(error.errno, 'name another place, or change its rights')}"


def ended(command: Callable[[], int | None]) -> int:
    """Run a command to its exit code: its own (None: 0), or 2 with one line on stderr for something to mend.

    85: stopped by SIGUSR1, to be started again; 143: stopped by SIGTERM; 130: by Ctrl-C. A broken pipe, and what is no
    fault of a user's, is raised.
    """
    try:
        return command() or 0
    except LabelfreeError as error:
        problem = str(error)
    except BrokenPipeError:  # nobody reads any more, see console.finished
        raise
    except OSError as error:
        problem = line_of(error)
        if problem is None:
            raise
    except RuntimeError as error:  # of torch, and what pathlib makes of links that lead in a circle
        lost = str(error).startswith("DataLoader worker")
        if not lost and not str(error).startswith("Symlink loop"):
            raise
        problem = LOST_READER if lost else f"{str(error)[0].lower()}{str(error)[1:]}; {_WAYS[errno.ELOOP]}"
    except ModuleNotFoundError as error:
        problem = f"the package {error.name} is missing; run `make setup`, or use .venv/bin/python"
    except Stopped as stop:
        if _first_process():
            log.info("%s", stop)
        return stop.code
    except KeyboardInterrupt as stop:
        be_deaf()
        if _first_process():
            print(str(stop) or "stopped; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {shown(problem)}", file=sys.stderr)
    return 2


def be_deaf() -> None:
    """No further Ctrl-C: libraries that clean up at the end of the process would each say something of it."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def _first_process() -> bool:
    """Of a run's; True before there can be several."""
    loaded = sys.modules.get("lightning.pytorch.utilities")
    known = getattr(loaded, "rank_zero_only", None)
    return known is None or getattr(known, "rank", 0) == 0
