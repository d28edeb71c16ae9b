"""A decoded picture, a table or a region map that the disk gives back changed is told, and made anew."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.base import regions
from datamodules.base.decoded import DecodedStore
from datamodules.files.reading import UnreadableError
from tests.datamodules.base.test_cache import everything, files, made, own_memory, same
from tests.datamodules.base.test_regions import Places, plan
from tests.datamodules.pictures import labelled_folder

__all__ = ["own_memory"]


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    return bytes(changed)


def every_picture(data) -> dict:
    """A batch of each training picture."""
    data.train_dataloader()  # which makes the file
    return everything(data.loader("train", "train"))


@pytest.fixture
def decoded(tmp_path):
    """A folder of pictures, what is read of it, and the finished file."""
    labelled_folder(tmp_path / "data")
    plain = every_picture(made(tmp_path / "data", tmp_path, "disk"))
    (path,) = [path for path in files(tmp_path) if "-train-" in path.name]
    return tmp_path, plain, path


def test_every_bit_of_a_decoded_file_counts(decoded, caplog):
    """The same batches, a line, and the file as it was: whatever was changed in it."""
    folder, plain, path = decoded
    whole, draw = path.read_bytes(), random.Random(0)
    data = made(folder / "data", folder, "disk")
    for place in [0, len(whole) - 1, *(draw.randrange(len(whole)) for _ in range(60))]:
        path.write_bytes(flipped(whole, place, draw.randrange(8)))
        data._stores.clear()
        caplog.clear()
        same(plain, every_picture(data))
        lines = [line for line in caplog.messages if "not what was written" in line]
        assert len(lines) == 1, place
        assert lines[0].startswith(f"{path}")
        assert path.read_bytes() == whole


def test_a_file_that_cannot_be_mended_is_read_all_the_same(decoded, caplog, monkeypatch):
    folder, plain, path = decoded
    path.write_bytes(flipped(path.read_bytes(), 3))
    monkeypatch.setattr(DecodedStore, "mend", lambda *_: None)
    for _ in range(2):
        data = made(folder / "data", folder, "disk")
        same(plain, every_picture(data))
    assert (
        caplog.messages.count(
            f"{path}: picture {data.source('train').id(0)} is not what was written; it is decoded again from its file"
        )
        == 2
    )


def maps(found: regions.RegionFiles) -> list[np.ndarray]:
    return [found.read(picture, size) for picture, size in enumerate(Places.sizes)]


def harmed(path: Path, other: Path, harm: str) -> None:
    whole = path.read_bytes()
    if harm == "gone":
        path.unlink()
    elif harm == "all gone":
        shutil.rmtree(path.parent)
    elif harm == "colour":
        Image.new("RGB", (60, 40)).save(path)
    else:
        path.write_bytes({"empty": b"", "cut": whole[: len(whole) // 2], "of another": other.read_bytes()}[harm])


@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "colour", "of another", "all gone"])
@pytest.mark.parametrize("late", [False, True])
def test_computed_regions_that_are_lost_come_back(harm, late, tmp_path, caplog):
    """At a start, or while a training reads them; one line, and the file is as it was."""
    found = regions.provide(plan(tmp_path))
    plain, paths = maps(found), sorted(tmp_path.glob("*/*/*.png"))
    contents = [path.read_bytes() for path in paths]
    harmed(paths[0], paths[1], harm)
    if not late:
        found = regions.provide(plan(tmp_path))
    for one, two in zip(plain, maps(found), strict=True):
        assert np.array_equal(one, two)
    assert [path.read_bytes() for path in paths] == contents
    again = [line for line in caplog.messages if "they are made anew" in line or "computed again" in line]
    assert len(again) == (3 if late and harm == "all gone" else 1)
    caplog.clear()
    maps(regions.provide(plan(tmp_path)))
    assert not caplog.messages


def test_every_bit_of_a_region_file_counts(tmp_path, caplog):
    found = regions.provide(plan(tmp_path))
    plain, path, draw = maps(found), min(tmp_path.glob("*/*/*.png")), random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        place = draw.randrange(len(whole))
        path.write_bytes(flipped(whole, place, draw.randrange(8)))
        caplog.clear()
        assert np.array_equal(found.read(0, Places.sizes[0]), plain[0]), place
        if caplog.messages:
            assert path.read_bytes() == whole
        path.write_bytes(whole)


def test_a_finished_folder_is_looked_at_again_where_its_note_is_spoilt(tmp_path, monkeypatch):
    regions.provide(plan(tmp_path))
    (note,) = tmp_path.glob("*/finished.json")
    whole = note.read_text()
    monkeypatch.setattr(Places, "read", lambda *_: pytest.fail("computed again"))
    for content in ("", "[]", whole.replace("3", "2")):
        note.write_text(content)
        regions.provide(plan(tmp_path))
        assert note.read_text() == whole


def test_a_region_file_of_a_picture_that_cannot_be_read_stays_away(tmp_path, monkeypatch):
    found = regions.provide(plan(tmp_path))
    min(tmp_path.glob("*/*/*.png")).unlink()
    cut = UnreadableError("p0", "cut")
    monkeypatch.setattr(Places, "read", lambda *_: (_ for _ in ()).throw(cut))
    with pytest.raises(UnreadableError, match="p0"):
        found.read(0, Places.sizes[0])
