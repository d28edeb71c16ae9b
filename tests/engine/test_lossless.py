"""Damaged checkpoints and full disks: nothing that was whole is lost, and one line says what happens."""

import errno
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import config
import run
from common import files
from common.errors import DiskFullError
from engine import checkpoints, setup
from engine.callbacks.run_keeper import RunKeeper
from engine.records.run_folder import History, RunFolder, open_run
from tests.conftest import run_small, small_words

METHOD = "kmeans_baseline"


class StopError(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run that ended in step 7: last.ckpt is of step 6, previous.ckpt and best.ckpt are of step 4."""
    end, parent = RunKeeper.on_train_batch_end, tmp_path_factory.mktemp("stopped")

    def dies(self, trainer, *rest):
        if trainer.global_step == 7:
            raise StopError
        end(self, trainer, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunKeeper, "on_train_batch_end", dies)
        with pytest.raises(StopError):
            run_small(METHOD, parent, "r")
    return parent / "r"


@pytest.fixture
def copied(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "r"))


def cfg_of(folder: Path):
    """The configuration of the run, as far as training has it: with the number of clusters that the data say."""
    words = [f"run.dir={folder.parent}", f"run.name={folder.name}", "method.num_clusters=12"]
    return config.compose(small_words(METHOD, *words))


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def one_byte(path: Path) -> None:
    """Of a tensor: torch.load does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    torch.load(path, weights_only=True)


def expect_same(folder: Path, plain) -> None:
    again = setup.read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert again.keys() == plain.weights.keys()
    for name, value in plain.weights.items():
        assert torch.equal(again[name], value), name
    assert (folder / "metrics.csv").read_text() == (plain.folder / "metrics.csv").read_text()


@pytest.mark.train
def test_what_a_run_keeps(stopped, small_run):
    steps = {path.name: setup.read_checkpoint(path)["global_step"] for path in (stopped / "checkpoints").iterdir()}
    assert steps == {"last.ckpt": 6, "previous.ckpt": 4, "best.ckpt": 4}
    finished = small_run(METHOD).folder / "checkpoints"
    assert sorted(path.name for path in finished.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.train
@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (half, "cut off, or no checkpoint"),
        (empty, "empty"),
        (garbage, "cut off, or no checkpoint"),
        (zeros, "cut off, or no checkpoint"),
        (one_byte, "changed since it was written"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(harm, reason, copied, caplog):
    last = copied / "checkpoints" / "last.ckpt"
    harm(last)
    folder = open_run(cfg_of(copied))
    assert (folder.state, folder.checkpoint, folder.damaged) == ("resume", folder.previous, {last: reason})
    assert caplog.messages == [f"{last} is damaged ({reason}) and skipped; going on from previous.ckpt, step 4"]


@pytest.mark.train
def test_a_run_with_a_damaged_checkpoint_ends_as_one_without(copied, small_run):
    half(copied / "checkpoints" / "last.ckpt")
    run_small(METHOD, copied.parent, "r")
    expect_same(copied, small_run(METHOD))
    kept = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert kept == ["best.ckpt", "last.ckpt", "last.ckpt.damaged"]


@pytest.mark.train
def test_the_newest_of_the_others_is_taken(copied, caplog):
    """A kill between the writes of best.ckpt and last.ckpt; and a file system that had to give up last.ckpt's name."""
    folder = RunFolder(copied, "new")
    folder.best.write_bytes(folder.last.read_bytes())
    folder.last.unlink()
    assert open_run(cfg_of(copied)).checkpoint == folder.best  # step 6
    garbage(folder.best)
    found = open_run(cfg_of(copied))
    assert (found.checkpoint, list(found.damaged)) == (folder.previous, [folder.best])
    found.mend()
    assert setup.read_checkpoint(folder.last)["global_step"] == 4
    assert open_run(cfg_of(copied)).checkpoint == folder.last


@pytest.mark.train
def test_without_a_whole_checkpoint_the_run_begins_anew(copied, small_run, caplog):
    for path in (copied / "checkpoints").iterdir():
        half(path)
    run_small(METHOD, copied.parent, "r")
    expect_same(copied, small_run(METHOD))
    then = "is damaged (cut off, or no checkpoint) and skipped; no whole one is left: training starts at step 0"
    places = [copied / "checkpoints" / f"{name}.ckpt" for name in ("last", "previous", "best")]
    assert [line for line in caplog.messages if "damaged" in line] == [f"{place} {then}" for place in places]


def test_a_file_system_without_links_keeps_the_one_before(tmp_path, monkeypatch):
    def refuses(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuses)
    for step in (1, 2):
        checkpoints.WholeCheckpointIO().save_checkpoint({"global_step": step}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"global_step": 2}
    assert torch.load(tmp_path / "previous.ckpt", weights_only=True) == {"global_step": 1}
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_kill_left_half_written_is_swept_up(tmp_path):
    folder = RunFolder(tmp_path / "x", "new")
    (tmp_path / "x" / "checkpoints").mkdir(parents=True)
    for name in ("checkpoints/.last.ckpt.4711", ".metrics.csv.4711", "checkpoints/last.ckpt", "checkpoints/.note"):
        (tmp_path / "x" / name).write_bytes(b"half")
    folder.create(config.compose([]))
    assert sorted(path.name for path in (tmp_path / "x" / "checkpoints").iterdir()) == [".note", "last.ckpt"]
    assert not (tmp_path / "x" / ".metrics.csv.4711").exists()


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 16 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", place], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that takes all room of a disk but `leave` bytes."""
    filler = disk / "filler"
    with filler.open("wb") as handle:
        handle.write(bytes(shutil.disk_usage(disk).free - leave))
    return filler


@pytest.mark.train
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a file system, which needs root")
@pytest.mark.parametrize(("room", "named"), [(0, "config.yaml"), (24576, "checkpoints/last.ckpt")])
def test_a_full_disk_loses_nothing(room, named, stopped, small_disk, small_run):
    """No room at all, or for small files alone; then there is room again."""
    folder = Path(shutil.copytree(stopped, small_disk / "r"))
    assert room < (folder / "checkpoints" / "last.ckpt").stat().st_size
    before = {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()}
    filler = fill(small_disk, room)
    with pytest.raises(DiskFullError) as caught:
        run_small(METHOD, small_disk, "r")
    assert str(caught.value) == (
        f"{folder / named}: cannot be written (No space left on device); nothing that was written before is lost. "
        "Make room, then the same command goes on"
    )
    assert {path.name: path.read_bytes() for path in (folder / "checkpoints").iterdir()} == before
    filler.unlink()
    run_small(METHOD, small_disk, "r")
    expect_same(folder, small_run(METHOD))


@pytest.mark.train
def test_a_limit_on_the_size_of_files_is_a_full_disk(copied, small_run, capfd):
    last = copied / "checkpoints" / "last.ckpt"
    size = last.stat().st_size
    words = ["train", *small_words(METHOD, f"run.dir={copied.parent}", "run.name=r")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        assert run.main(words) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    lines = capfd.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error:")] == [
        f"error: {last}: cannot be written (File too large); nothing that was written before is lost. Make room, then "
        "the same command goes on"
    ]
    assert not [line for line in lines if "Traceback" in line]
    assert setup.read_checkpoint(last)["global_step"] == 6
    run_small(METHOD, copied.parent, "r")
    expect_same(copied, small_run(METHOD))


def test_a_row_that_a_full_disk_cut_is_dropped(tmp_path):
    history = History(tmp_path / "metrics.csv")
    history.restore(0)
    for step in (9, 10, 11):
        history.add(step, {"a": float(step)})
    content = (tmp_path / "metrics.csv").read_bytes()
    (tmp_path / "metrics.csv").write_bytes(content[:-5])  # what is left of 11,11 is 1
    resumed = History(tmp_path / "metrics.csv")
    resumed.restore(10)
    assert [row["step"] for row in resumed.rows] == ["9", "10"]
