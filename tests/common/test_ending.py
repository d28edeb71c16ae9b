"""How commands end: one line for whatever the system says of a file, exit codes of signals, no traceback."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import config
import run
from common import ending
from common.errors import Stopped
from launch import submit, sweep

WORDS = ["data=scenes", "backbone=tiny", "trainer=cpu", "trainer.max_steps=1"]


def raising(error: BaseException):
    def command():
        raise error

    return command


def broken(number: int, name: str | None = "/disk/x") -> OSError:
    return OSError(number, os.strerror(number), *([] if name is None else [name]))


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            broken(errno.EROFS),
            "/disk/x: read-only file system; name another place, or mount the disk so that it can be written to",
        ),
        (broken(errno.ENAMETOOLONG), "/disk/x: file name too long; choose a shorter name"),
        (broken(errno.ENOENT), "/disk/x: no such file or directory; mend the name"),
        (broken(errno.ELOOP), "/disk/x: too many levels of symbolic links; mend the link, or name another place"),
        (broken(errno.EACCES), "/disk/x: permission denied; name another place, or change its rights"),
        (broken(errno.EXDEV), "/disk/x: invalid cross-device link; name another place, or change its rights"),
        (
            broken(errno.EIO, None),
            "a file: input/output error; the disk, or the machine that holds it, does not work as it should; once it "
            "does, the same command goes on",
        ),
        (
            broken(errno.ESTALE),
            "/disk/x: stale file handle; the disk, or the machine that holds it, does not work as it should; once it "
            "does, the same command goes on",
        ),
        (
            broken(errno.ENOSPC),
            "/disk/x: cannot be written (No space left on device); nothing that was written before is lost. Make "
            "room, then the same command goes on",
        ),
        (broken(errno.ENOENT, "/a\nb"), "/a\\nb: no such file or directory; mend the name"),
    ],
)
def test_what_the_system_says_of_a_file_is_a_line(error, line, capsys):
    assert ending.ended(raising(error)) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.parametrize("error", [OSError("odd"), ConnectionRefusedError(111, "Connection refused"), KeyError("x")])
def test_what_concerns_no_file_is_raised(error):
    with pytest.raises(type(error)):
        ending.ended(raising(error))


def test_codes():
    before = signal.getsignal(signal.SIGINT)
    try:
        assert ending.ended(lambda: None) == 0
        assert ending.ended(lambda: 1) == 1
        assert ending.ended(raising(Stopped(signal.SIGUSR1, 3, saved=True))) == 85
        assert ending.ended(raising(Stopped(signal.SIGTERM, 3, saved=True))) == 143
        assert signal.getsignal(signal.SIGINT) == before
        assert ending.ended(raising(KeyboardInterrupt())) == 130
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # a second Ctrl-C says nothing
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_may_end_a_command():
    found = []
    thread = threading.Thread(target=lambda: found.append(ending.ended(raising(KeyboardInterrupt("stopped")))))
    thread.start()
    thread.join()
    assert found == [130]


@pytest.fixture
def read_only(tmp_path) -> Iterator[Path]:
    place = tmp_path / "ro"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def commands(folder: Path) -> list[tuple]:
    site = str(folder)
    sweeps = [f"sweep={Path(config.__file__).parent / 'configs' / 'sweep' / 'hidden_positives.yaml'}", "offline=true"]
    return [
        (run.main, ["train", *WORDS, f"run.dir={folder}"]),
        (run.main, ["compare", "methods=kmeans_baseline", *WORDS, f"run.dir={folder}"]),
        (run.main, ["pseudo", "method=tokencut", *WORDS, f"cache.dir={folder}"]),
        (run.main, ["eval", f"ckpt={folder}/x.ckpt"]),
        (sweep.main, [*sweeps, f"run.dir={folder}", *WORDS[1:]]),
        (submit.main, ["dry=true", f"site={site}"]),
    ]


def refused_everywhere(folder: Path, capsys) -> list[str]:
    lines = []
    for main, words in commands(folder):
        assert main(words) == 2, words
        err = capsys.readouterr().err
        lines += [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in err
    assert len(lines) == len(commands(folder))
    return lines


@pytest.mark.train
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a file system, which needs root")
def test_a_read_only_disk_is_a_line_in_every_command(read_only, capsys):
    lines = refused_everywhere(read_only, capsys)
    assert all(str(read_only) in line for line in lines)
    assert sum("read-only file system; name another place" in line for line in lines) >= 3


@pytest.mark.train
@pytest.mark.parametrize("kind", ["long", "circle", "proc"])
def test_names_that_cannot_be_are_lines_in_every_command(kind, tmp_path, capsys):
    folder = {"long": tmp_path / ("n" * 300), "circle": tmp_path / "circle", "proc": Path("/proc/nothing")}[kind]
    if kind == "circle":
        folder.symlink_to(folder)
    refused_everywhere(folder, capsys)


@pytest.mark.train
def test_a_run_name_that_is_too_long(tmp_path, capsys):
    assert run.main(["train", *WORDS, f"run.dir={tmp_path}", f"run.name={'n' * 300}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("file name too long; choose a shorter name")


def test_ctrl_c_twice_is_one_line(tmp_path):
    """The second one comes while the process ends."""
    code = (
        "import atexit, os, signal, sys\n"
        "from common import ending\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), sum(range(1000))))\n"
        "def command():\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    sum(range(1000))\n"
        "sys.exit(ending.ended(command))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=hears_ctrl_c)
    assert (done.returncode, done.stderr) == (130, "stopped; the same command goes on\n")


def hears_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
