"""What two processes of a stage agree on: few shards, errors while reading, and what is there already."""

import os
from pathlib import Path

import pytest

from common.errors import LabelfreeError
from datamodules.files.reading import UnreadableError
from datamodules.scenes.module import ScenesDataModule
from engine.stages.stage import Stage
from pseudo_labels.cache import Place
from tests.pseudo_labels.stages import Dark, files, stage
from tests.support.ranks import on_two_ranks

pytestmark = [pytest.mark.train, pytest.mark.ddp]

TWO = ("trainer.accelerator=cpu", "trainer.strategy=ddp", "trainer.devices=2")


class Chosen(Dark):
    name = "dark"

    def pictures(self, count):
        return [1, 2, 9]

    def settings(self):
        return super().settings() | {"pictures": [1, 2, 9]}


def outcome(rank: int, folder: Path, step: Dark, words: tuple[str, ...] = ()) -> str:
    """The error of the stage on a rank, or nothing."""
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        stage(folder, [step], *TWO, *words).run()
    except LabelfreeError as error:
        return str(error)
    return ""


def test_fewer_shards_than_processes(tmp_path):
    work = stage(tmp_path, [Dark()])
    work.run()
    before = files(tmp_path)
    work.places["dark"].shard(2).unlink()
    (work.places["dark"].path / "manifest.json").unlink()
    assert on_two_ranks(outcome, tmp_path, Dark(), start="fork") == ["", ""]
    assert files(tmp_path) == before


def test_a_process_without_a_chosen_picture(tmp_path):
    work = stage(tmp_path, [Chosen()])
    work.run()
    before = files(tmp_path)
    for number in (2, 3):  # picture 9 is in shard 2, nothing in shard 3
        work.places["dark"].shard(number).unlink()
    (work.places["dark"].path / "manifest.json").unlink()
    assert on_two_ranks(outcome, tmp_path, Chosen(), start="fork") == ["", ""]
    assert files(tmp_path) == before


def broken(monkeypatch, error: type[LabelfreeError], numbers: tuple[int, ...]) -> None:
    build = ScenesDataModule.build_source

    def cut(self, split):
        source = build(self, split)
        read = source.read

        def wrong(index):
            if index in numbers:
                raise UnreadableError(f"{index}.png", "cut") if error is UnreadableError else error("cannot go on")
            return read(index)

        source.read = wrong
        return source

    monkeypatch.setattr(ScenesDataModule, "build_source", cut)


def test_an_error_while_reading_ends_both(tmp_path, monkeypatch):
    broken(monkeypatch, LabelfreeError, (5,))  # of rank 1
    other = "the offline stage: another process could not do its part; its own line says why"
    assert on_two_ranks(outcome, tmp_path, Dark(), start="fork") == [other, "cannot go on"]
    assert not list(tmp_path.rglob("manifest.json"))


def test_broken_pictures_of_all_processes_count_together(tmp_path, monkeypatch):
    broken(monkeypatch, UnreadableError, (1, 2, 5, 6))  # two on each rank, where three end a run
    found = on_two_ranks(outcome, tmp_path, Dark(), ("data.max_broken=0.15",), start="fork")
    assert found[0] == found[1]
    assert found[0].startswith("4 of the 22 pictures of 'train' cannot be read, more than data.max_broken=0.15 allows")


def blind(rank: int, folder: Path, blinded: int) -> list[str]:
    """The steps that a rank computes, where one of them does not see the folder at its first look."""
    complete, computed, looks = Place.complete.fget, [], []

    def seen(place):
        looks.append(place)
        return complete(place) and not (rank == blinded and len(looks) == 1)

    Place.complete = property(seen)
    work = Stage._compute
    Stage._compute = lambda self, step, *rest: (computed.append(step.name), work(self, step, *rest))[1]
    return [*computed, outcome(rank, folder, Dark()), *computed]


@pytest.mark.parametrize("blinded", [0, 1])
def test_all_do_what_the_first_process_sees(tmp_path, blinded):
    stage(tmp_path, [Dark()]).run()
    before = files(tmp_path)
    lost = f"cache.dir={stage(tmp_path, [Dark()]).root}: "
    found = on_two_ranks(blind, tmp_path, blinded, start="fork")
    if blinded == 0:  # both look again, and find it whole
        assert found == [["", "dark"], ["", "dark"]]
    else:
        assert found[0] == found[1]
        assert found[0][0].startswith(lost)
        assert found[0][0].endswith("is not seen by every process; name a folder that all machines share")
    assert files(tmp_path) == before
