"""Python programs in processes that start warm: each is forked off a server that has imported everything.

A process that imports torch, lightning and what else a run needs computes seven seconds before its first line. The
server (multiprocessing's forkserver, one for each process of pytest, made when it is first needed) does that once; a
program is a fork of it: with its own arguments, folder, environment, signals and output, and nothing computed before.
Tests of how a program starts or of its imports start `sys.executable` themselves.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from engine.callbacks import screen

ROOT = Path(__file__).parents[2]
SERVER = multiprocessing.get_context("forkserver")


def serve() -> None:
    """Make the server, where it is not there yet; it looks for modules in the tree that this file is of."""
    multiprocessing.set_forkserver_preload(["tests.support.preloaded"])
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        forkserver.ensure_running()


class Program:
    """A program that runs: `subprocess.Popen`, as far as tests and Lightning ask for it."""

    def __init__(
        self,
        command: Sequence[str | os.PathLike[str]],
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        out: str | os.PathLike[str] | None = None,
        err: str | os.PathLike[str] | None = None,
    ) -> None:
        """command: Python's interpreter, then a script, `-m` and a module or `-c` and code, then words. out, err: files
        (terminals) to write to; those of this program, where it is one, or else new ones."""
        self.args = command
        self.folder = tempfile.TemporaryDirectory()
        self.out = out or _OWN.get(1, f"{self.folder.name}/out")
        self.err = err or _OWN.get(2, f"{self.folder.name}/err")
        _, *words = map(os.fspath, command)
        place, variables = os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env)
        if not _OWN:
            serve()
        self.process = SERVER.Process(target=_run, args=(words, place, variables, self.out, self.err))
        with _without_main():
            self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait; what it wrote to standard output and to standard error."""
        self.wait(timeout)
        return tuple(Path(path).read_text() if Path(path).is_file() else "" for path in (self.out, self.err))

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def ran(command: Sequence[Any], *, timeout: float, **more: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of a program; killed where it takes longer."""
    program = Program(command, **more)
    try:
        out, err = program.communicate(timeout)
    finally:
        program.kill()
        program.process.join()
    return subprocess.CompletedProcess(command, program.returncode, out, err)


@contextmanager
def _without_main():
    """multiprocessing imports the script of the process that starts another one; these have scripts of their own."""
    with mock.patch.dict(sys.modules, __main__=types.ModuleType("__main__")):
        yield


_OWN: dict[int, str] = {}
"""In a program: the files of its output."""


def _run(words: list[str], place: str, variables: dict[str, str], out: str, err: str) -> None:
    """In the fork: become the program."""
    forkserver._forkserver.ensure_running = lambda: None  # what it starts is of the same server: there is no other
    _OWN.update({1: out, 2: err})
    _write_to(out, err)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(place)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs deaf to it, and so pytest
    _set_up_libraries(variables)
    try:
        _become(words)
    finally:
        atexit._run_exitfuncs()


def _write_to(out: str, err: str) -> None:
    """Standard output and error as Python opens them for a file and for a terminal; loggers know the new ones."""
    former = sys.stderr
    for number, path in ((1, out), (2, err)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    for handler in screen.handlers():
        if handler.stream is former:
            handler.setStream(sys.stderr)


def _become(words: list[str]) -> None:
    first, *rest = words
    if first == "-c":
        code, *words = rest
        sys.argv, sys.path[0:0] = ["-c", *words], [""]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), main.__dict__)
    elif first == "-m":
        sys.argv, sys.path[0:0] = rest, [os.getcwd()]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0:0] = words, [os.path.dirname(os.path.abspath(first))]
        runpy.run_path(first, run_name="__main__")


def _set_up_libraries(variables: Mapping[str, str]) -> None:
    """What the libraries have read from the environment of the server; and Lightning's further processes start warm."""
    import torch
    from lightning.pytorch.strategies.launchers import subprocess_script
    from lightning.pytorch.utilities import rank_zero_only

    rank_zero_only.rank = int(variables.get("LOCAL_RANK", 0))
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    subprocess_script.subprocess = types.SimpleNamespace(Popen=Program)
