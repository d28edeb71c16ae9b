"""Pictures of more than 8 bits: their whole values, the range that is read, what is said, and fourth bands."""

import struct
import zlib

import numpy as np
import pytest
import tifffile
from PIL import Image

from common.errors import ConfigError, DataError
from datamodules.files import ranges
from datamodules.files.opening import opened
from datamodules.files.reading import UnreadableError, read_picture
from datamodules.folder import pictures_below
from tests.datamodules.pictures import config, module, noise, save


def deep(bands: int = 3, top: int = 65536, seed: int = 0) -> np.ndarray:
    found = np.random.default_rng(seed).integers(0, top, (20, 30, bands), dtype=np.uint16)
    return found[..., 0] if bands == 1 else found


def png16(path, array: np.ndarray) -> None:
    """Pillow writes no colour png of 16 bits."""
    kind = {2: 4, 3: 2, 4: 6}[array.shape[2]]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def tif(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, array, **({"photometric": "rgb"} | options))
    return path


WRITERS = {
    "png": png16,
    "tif": tif,
    "other byte order": lambda path, array: tif(path, array, byteorder=">"),
    "deflate": lambda path, array: tif(path, array, compression="zlib"),
    "predictor": lambda path, array: tif(path, array, compression="zlib", predictor=True),
}


@pytest.mark.parametrize("bands", [3, 4])
@pytest.mark.parametrize("kind", WRITERS)
def test_all_bits_of_colour(tmp_path, kind, bands):
    path = tmp_path / ("a.png" if kind == "png" else "a.tif")
    array = deep(bands)
    WRITERS[kind](path, array)
    with opened(path) as image:
        assert ranges.is_deep(image)
        np.testing.assert_array_equal(ranges.values(image)[..., :3], array[..., :3])


def test_twelve_bits_keep_their_grey_levels(tmp_path):
    grey, colour = deep(1, 4096), deep(3, 4096)
    for path, array in ((tmp_path / "g.png", grey), (tmp_path / "g.tif", grey)):
        save(path, array)
        assert read_picture(path).max() <= 16
        expected = np.round(array * (255 / 4095)).astype(np.uint8)
        np.testing.assert_array_equal(read_picture(path, (0, 4095)), np.dstack([expected] * 3))
    for kind, write in WRITERS.items():
        write(tmp_path / f"{kind}.x", colour)
        np.testing.assert_allclose(read_picture(tmp_path / f"{kind}.x", (0, 4095)), colour * (255 / 4095), atol=0.51)
        assert read_picture(tmp_path / f"{kind}.x").max() == 15


def test_what_lies_outside_is_cut_and_8_bits_are_left_alone(tmp_path):
    save(tmp_path / "a.tif", np.array([[0, 100, 200, 300]], np.uint16))
    assert read_picture(tmp_path / "a.tif", (100, 200))[0, :, 0].tolist() == [0, 0, 255, 255]
    save(tmp_path / "b.png", noise())
    np.testing.assert_array_equal(read_picture(tmp_path / "b.png", (100, 200)), noise())


@pytest.mark.parametrize(
    ("array", "chosen"),
    [
        (np.array([[-1000, 0, 1000]], np.int32), (-1000, 1000)),
        (np.array([[0.0, 0.5, 1.0]], np.float32), (0, 1)),
        (np.array([[0, 2**30, 2**31 - 2]], np.int32), (0, 2**31 - 2)),
    ],
)
def test_values_that_are_no_16_bits_need_a_range(tmp_path, array, chosen):
    path = save(tmp_path / "a.tif", array)
    with pytest.raises(UnreadableError, match=r"name their range in data.value_range=\[low,high\] or auto"):
        read_picture(path)
    assert read_picture(path, chosen)[0, :, 0].tolist() == [0, 128, 255]


def test_places_without_a_number_are_dark(tmp_path):
    path = save(tmp_path / "a.tif", np.array([[np.nan, np.inf, -np.inf, 1]], np.float32))
    assert read_picture(path, (0, 2))[0, :, 0].tolist() == [0, 255, 0, 128]


def test_bands_that_lie_apart_are_no_noise(tmp_path):
    path = tif(tmp_path / "a.tif", deep().transpose(2, 0, 1).copy(), planarconfig="separate")
    for chosen in (None, (0, 4095)):
        with pytest.raises(UnreadableError, match="its 16-bit bands lie one after the other"):
            read_picture(path, chosen)
    tif(path, noise().transpose(2, 0, 1).copy(), planarconfig="separate")
    np.testing.assert_array_equal(read_picture(path), noise())


# ---- a folder of them ----


def folder(root, make, count: int = 12, write=save):
    for i in range(count):
        write(root / f"p{i}.tif", make(i))
    return root


def said(caplog) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    caplog.clear()
    return found


def ramp(low: float, high: float, dtype=np.uint16, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(low, high, (20, 30))
    return values.astype(dtype)


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda i: ramp(949, 2218, seed=i), "[0,4095]"),
        (lambda i: ramp(100, 900, seed=i), "[0,1023]"),
        (lambda i: ramp(0, 16383, seed=i), "[0,16383]"),
        (lambda i: deep(3, 4096, seed=i), "[0,4095]"),
    ],
)
def test_a_small_part_of_the_range_is_said_once(tmp_path, caplog, make, shown):
    root = folder(tmp_path, make, write=lambda path, array: tif(path, array) if array.ndim == 3 else save(path, array))
    first = [module(root) and said(caplog) for _ in range(2)]
    assert first[0] == first[1]
    (line,) = first[0]
    assert "and 10 more: values of more than 8 bits, " in line
    assert line.endswith(
        f"where 0..65535 is read: dark, with few grey levels; set data.value_range={shown} (what becomes 0 and 255), "
        "or data.value_range=auto for percentiles of the training pictures"
    )
    values = [int(value) for value in shown[1:-1].split(",")]
    found = module(root, value_range=values)
    assert said(caplog) == []
    assert found.source("train").read(0)[0].max() > 100
    assert found.source("train").fingerprint() != module(root).source("train").fingerprint()


def test_the_whole_range_and_8_bits_need_no_word(tmp_path, caplog):
    module(folder(tmp_path / "a", lambda i: ramp(0, 65535, seed=i)))
    module(folder(tmp_path / "b", lambda i: noise(seed=i)))
    assert said(caplog) == []


def test_negative_and_float_values_are_said(tmp_path, caplog):
    module(folder(tmp_path / "a", lambda i: ramp(-1000, 3000, np.int32, i)))
    module(folder(tmp_path / "b", lambda i: ramp(0, 1, np.float32, i)))
    lines = said(caplog)
    assert len(lines) == 2
    assert all("nearly black or lost; set data.value_range=[" in line for line in lines)
    found = module(tmp_path / "b", value_range="auto")
    assert found.settled()["data.value_range"] == pytest.approx([0.005, 0.995], abs=0.003)


def test_auto_takes_percentiles_of_the_training_pictures(tmp_path):
    root = folder(tmp_path, lambda i: ramp(1000, 3000, seed=i))
    (low, high), again = (module(root, value_range="auto").settled()["data.value_range"] for _ in range(2))
    assert [low, high] == again
    assert 1000 <= low < 1030
    assert 2970 < high <= 3000
    assert module(root, value_range=[low, high]).settled() == {"data.value_range": [low, high]}
    assert module(folder(tmp_path / "8", lambda i: noise(seed=i)), value_range="auto").settled() == {
        "data.value_range": None
    }
    with pytest.raises(DataError, match=r"data\.value_range=auto: the training pictures looked at hold one value, 7"):
        module(folder(tmp_path / "one", lambda i: np.full((20, 30), 7, np.uint16)), value_range="auto")


def test_places_without_data_do_not_count(tmp_path):
    def write(path, array):
        array[:10] = -9999
        tif(path, array, photometric="minisblack", extratags=[(42113, 2, 0, "-9999", True)])

    root = folder(tmp_path, lambda i: ramp(0, 100, np.float32, i), write=write)
    low, high = module(root, value_range="auto").settled()["data.value_range"]
    assert 0 <= low < 5
    assert 95 < high <= 100


@pytest.mark.parametrize("given", ["full", [1], [3, 3], [5, 1], [0, "x"], [0, float("inf")], 7])
def test_ranges_that_are_none(tmp_path, given):
    root = folder(tmp_path, lambda i: noise(seed=i))
    with pytest.raises(ConfigError, match=r"expected \[low,high\], the values of pictures of more than 8 bits"):
        module(root, value_range=given)


def test_prediction_keeps_the_range_and_cannot_choose_one(tmp_path, caplog):
    root = folder(tmp_path, lambda i: ramp(949, 2218, seed=i))
    data = config(value_range=[0, 4095]).data
    assert pictures_below(root, data=data).read(0)[0].max() > 100
    assert said(caplog) == []
    assert pictures_below(root, data=config().data).read(0)[0].max() < 10
    assert "set data.value_range=[0,4095]" in said(caplog)[0]
    pictures_below(root, data={"name": "scenes"})
    assert said(caplog)[0].endswith("save them with 8 bits, scaled as the training pictures were")
    with pytest.raises(ConfigError, match=r"data\.value_range=auto: only training chooses a range"):
        pictures_below(root, data=config(value_range="auto").data)


# ---- bands ----


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_fourth_band_that_is_no_transparency_is_left_out(tmp_path, caplog, kind, dtype):
    def make(i):
        array = np.dstack([noise(seed=i), noise(seed=i + 50)[..., 0]])
        return (array.astype(np.uint16) * 257) if dtype == np.uint16 else array

    root = folder(tmp_path, make, write=lambda path, array: tif(path, array, extrasamples=[kind]))
    found = module(root)
    for source in (found.source("train"), found.source("val")):
        for i in range(len(source)):
            number = int(source.id(i)[1:])
            np.testing.assert_allclose(source.read(i)[0], noise(seed=number), atol=1)
    (line,) = said(caplog)
    assert line.endswith(
        ".tif and 10 more: a band beside the colours is no transparency (such as infrared) and is left out"
    )


@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha"])
def test_plain_transparency_is_laid_on_white(tmp_path, caplog, kind):
    alpha = np.full((24, 32), 255, np.uint8)
    alpha[:8] = 0
    colours = noise() * (alpha[..., None] > 0) if kind == "assocalpha" else noise()
    root = folder(tmp_path, lambda i: np.dstack([colours, alpha]), write=lambda p, a: tif(p, a, extrasamples=[kind]))
    image = module(root).source("train").read(0)[0]
    assert (image[:8] == 255).all()
    np.testing.assert_array_equal(image[8:], noise()[8:])
    assert said(caplog) == []


def test_further_pages_are_said(tmp_path, caplog):
    pages = [Image.fromarray(noise(seed=i)) for i in range(3)]
    for i in range(4):
        pages[0].save(tmp_path / f"p{i}.tif", save_all=True, append_images=pages[1:])
    module(tmp_path)
    (line,) = said(caplog)
    assert "and 2 more: holds several pages, and the first alone is read" in line
