"""Pictures too large, or too long and thin: named and left out, or seen by windows, and never a stall."""

import json
import pickle

import numpy as np
import pytest
from PIL import Image

import run
from common import memory
from datamodules.base import shapes
from datamodules.base.dataset import PictureDataset
from datamodules.base.transforms import NATIVE, Geometry
from datamodules.files import opening, reading
from datamodules.files.reading import UnreadableError, WindowsOnlyError, read_picture
from datamodules.folder import pictures_below
from reporting import panels
from tests.conftest import run_small
from tests.datamodules.pictures import noise, save


@pytest.mark.parametrize("crop", ["center", "random", "five", "keep", NATIVE])
def test_sixteen_times_the_usual_pixels_is_the_most(crop):
    geometry = Geometry(48, crop)
    assert not shapes.is_long(geometry, 10, 160)
    assert shapes.is_long(geometry, 10, 171)
    assert shapes.is_long(geometry, 1, 50_000_000)
    assert not shapes.is_long(geometry, 1, 1)


def test_what_is_squeezed_into_a_fixed_size_may_have_any_shape():
    assert not shapes.is_long(Geometry(48, "none"), 1, 50_000_000)
    assert shapes.is_long(Geometry((48, 96), "random"), 1, 100)


@pytest.fixture
def odd(tmp_path):
    """Two pictures and four that are too long, of some hundred bytes each."""
    folder = tmp_path / "odd"
    for number in range(2):
        save(folder / f"{number}.png", noise(48, 64, seed=number))
    for size in ((5, 1000), (1000, 5), (3, 200_000), (50_000_000, 1)):
        Image.new("L", size).save(folder / f"{size[0]}x{size[1]}.png")
    return folder


def test_training_passes_over_them_and_names_them(odd):
    source = pictures_below(odd)
    data = PictureDataset(source, Geometry(48, "random"), False, 0, "train")
    found = {source.id(index): data[index] for index in range(len(source))}
    assert {name for name, item in found.items() if item.image is not None} == {"0", "1"}
    [(file, message)] = found["5x1000"].broken
    assert file == f"{odd}/5x1000.png"
    assert message == (
        f"{odd}/5x1000.png: 5x1000 pixels (width x height) are so long and thin that they would have more than 16 "
        "times the usual number of patches; cut it into parts, or let predict see it by windows "
        "(predict.window=<pixels>)"
    )


@pytest.mark.parametrize("error", [MemoryError(), OverflowError("x")])
def test_too_little_memory_leaves_a_picture_out(tmp_path, monkeypatch, error):
    save(tmp_path / "a.png", noise())
    monkeypatch.setattr(Geometry, "resize", lambda *_, **__: (_ for _ in ()).throw(error))
    item = PictureDataset(pictures_below(tmp_path), Geometry(48, "center"), False, 0, "train")[0]
    assert item.broken[0][1].endswith("(it needs more memory than there is)")


def test_memory_is_looked_at_before_it_is_taken(tmp_path, monkeypatch):
    save(tmp_path / "a.png", noise(64, 64))
    monkeypatch.setattr(opening, "SMALL", 1000)
    monkeypatch.setattr(memory, "free", lambda: 20_000)
    with pytest.raises(UnreadableError, match=r"0 million pixels need about 41.0 kB of memory, and 20.0 kB are free"):
        read_picture(tmp_path / "a.png")
    assert reading.header_size(tmp_path / "a.png") == (64, 64)
    monkeypatch.setattr(memory, "free", lambda: None)
    assert read_picture(tmp_path / "a.png").shape == (64, 64, 3)


def test_free_memory_is_that_of_the_machine_and_of_the_container(tmp_path, monkeypatch):
    assert memory.free() > 1 << 20
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    assert memory.free() is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   4 kB\n")
    assert memory.free() == 4096
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory.free() == 2000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free() == 4096


def test_a_picture_above_the_limit_of_pixels_names_the_way_out(tmp_path, monkeypatch):
    save(tmp_path / "a.png", noise(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for reader in (read_picture, reading.header_size):
        with pytest.raises(WindowsOnlyError) as caught:
            reader(tmp_path / "a.png")
        assert str(caught.value) == (
            f"{tmp_path}/a.png: 0 million pixels are more than the 0 million that are read as a whole; cut it into "
            "parts, or let predict see it by windows (predict.window=<pixels>)"
        )
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (WindowsOnlyError, str(caught.value))


def test_panels_of_tall_pictures_stay_small(tmp_path):
    panels.save(tmp_path / "a.png", [panels.Row(np.zeros((20_000, 2, 3), np.uint8), {})], panels.ClassMeta())
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.height < 9 * 320


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_small("kmeans_baseline", tmp_path_factory.mktemp("odd"), "a")


def call(capsys, trained, command: str, *words: str) -> tuple[int, str]:
    code = run.main([command, f"ckpt={trained.folder}/checkpoints/last.ckpt", *words])
    return code, capsys.readouterr().err


@pytest.mark.train
def test_predict_sees_them_by_windows(odd, trained, tmp_path, capsys, caplog):
    (odd / "50000000x1.png").unlink()  # 150 MB of memory; the others show the same
    out = tmp_path / "out"
    assert call(capsys, trained, "predict", f"input={odd}", f"output={out}")[0] == 0
    said = [record.getMessage() for record in caplog.records if "seen by windows" in record.getMessage()]
    assert len(said) == 3
    assert said[0].startswith(f"{odd}/1000x5.png: 1000x5 pixels (width x height) are so long and thin")
    assert said[0].endswith("it is seen by windows of 48 px (predict.window=48: at its own scale)")
    found = json.loads((out / "clusters.json").read_text())
    assert (found["pictures"], found["unreadable"]) == (5, [])
    for name, size in {"1000x5": (1000, 5), "5x1000": (5, 1000), "3x200000": (3, 200_000), "0": (64, 48)}.items():
        with Image.open(out / "index" / f"{name}.png") as drawn:
            assert drawn.size == size
    names = [line.split(",")[0] for line in (out / "areas.csv").read_text().splitlines()[1:]]
    assert names == ["0.png", "1.png", "1000x5.png", "3x200000.png", "5x1000.png"]


@pytest.mark.train
def test_predict_reads_above_the_limit_of_pixels(trained, tmp_path, monkeypatch, capsys):
    save(tmp_path / "in" / "a.png", noise(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    assert call(capsys, trained, "predict", f"input={tmp_path}/in", f"output={tmp_path}/out")[0] == 0
    monkeypatch.undo()
    with Image.open(tmp_path / "out" / "index" / "a.png") as drawn:
        assert drawn.size == (300, 300)


@pytest.mark.train
def test_predict_by_windows_keeps_long_pictures_at_their_own_scale(trained, tmp_path, capsys):
    Image.new("RGB", (3000, 3), "red").save(save(tmp_path / "in" / "a.png", noise()))
    words = (f"input={tmp_path}/in", f"output={tmp_path}/out", "predict.window=48", "predict.size=320")
    assert call(capsys, trained, "predict", *words)[0] == 0
    with Image.open(tmp_path / "out" / "index" / "a.png") as drawn:
        assert drawn.size == (3000, 3)


@pytest.mark.train
@pytest.mark.parametrize("words", [("explain", "point=1,1"), ("retrieve",)])
def test_explain_and_retrieve_say_it_in_one_line(odd, trained, capsys, words):
    code, said = call(capsys, trained, words[0], f"image={odd}/1000x5.png", *words[1:])
    assert code == 2
    [line] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {odd}/1000x5.png: 1000x5 pixels (width x height) are so long and thin")
