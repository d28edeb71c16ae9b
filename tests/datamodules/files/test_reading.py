"""Real files of every kind, whole and broken."""

import io
import pickle

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.errors import DataError
from datamodules.files import reading
from datamodules.files.reading import UnreadableError
from tests.datamodules.pictures import noise, save

KINDS = {
    "png": {},
    "bmp": {},
    "tif": {"compression": "tiff_lzw"},
    "webp": {"lossless": True},
    "jpg": {"quality": 98, "subsampling": 0},
}


@pytest.mark.parametrize("ending", [*KINDS, "JPEG", "PNG", "TIFF"])
def test_every_ending_gives_the_picture(tmp_path, ending):
    picture = noise()
    options = KINDS.get(ending.lower(), KINDS["jpg"] if ending == "JPEG" else {})
    path = save(tmp_path / f"a.{ending}", picture, **options)
    got = reading.read_picture(path)
    assert reading.is_picture(path.name)
    assert got.dtype == np.uint8
    assert got.shape == picture.shape
    assert np.abs(got.astype(int) - picture).max() <= (25 if ending.lower().startswith("jp") else 0)
    assert reading.header_size(path) == (24, 32)


def test_grey_bilevel_and_palette(tmp_path):
    grey = noise()[..., 0]
    for name, image in {
        "l.png": Image.fromarray(grey),
        "p.png": Image.fromarray(noise()).quantize(17),
        "one.png": Image.fromarray(grey > 99),
        "la.png": Image.merge("LA", [Image.fromarray(grey), Image.new("L", (32, 24), 255)]),
    }.items():
        image.save(tmp_path / name)
        expected = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(reading.read_picture(tmp_path / name), expected)


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_divided_by_257(tmp_path, ending):
    values = np.array([[0, 128, 129, 257, 40000, 65407, 65408, 65535]], dtype=np.uint16).repeat(3, axis=0)
    path = save(tmp_path / f"deep.{ending}", values)
    got = reading.read_picture(path)
    assert got.shape == (3, 8, 3)
    assert got[0, :, 0].tolist() == [0, 0, 1, 1, 156, 255, 255, 255]
    assert (got == got[..., :1]).all()


def test_16_bit_colour_png_keeps_its_high_byte(tmp_path):
    """Pillow writes no such file, so this one is put together by hand."""
    import struct
    import zlib

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    pixels = np.array([[[0, 300, 65535], [4660, 511, 512]]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    assert reading.read_picture(tmp_path / "a.png").tolist() == [[[0, 1, 255], [18, 1, 2]]]


def test_transparency_lies_on_white(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :2] = [10, 20, 30, 255]
    rgba[:, 2:4] = [0, 0, 0, 128]
    for ending in ("png", "tif", "webp"):
        path = save(tmp_path / f"a.{ending}", rgba, **({"lossless": True} if ending == "webp" else {}))
        got = reading.read_picture(path)
        assert got[0, 0].tolist() == [10, 20, 30]
        assert got[0, 2].tolist() == [127, 127, 127]
        assert got[0, 5].tolist() == [255, 255, 255]
    palette = Image.fromarray(noise()).quantize(8)
    palette.save(tmp_path / "p.png", transparency=int(np.asarray(palette)[0, 0]))
    assert reading.read_picture(tmp_path / "p.png")[0, 0].tolist() == [255, 255, 255]


def test_cmyk(tmp_path):
    image = Image.fromarray(noise()).convert("CMYK")
    image.save(tmp_path / "a.jpg", quality=98)
    image.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(reading.read_picture(tmp_path / "a.tif"), noise())
    assert np.abs(reading.read_picture(tmp_path / "a.jpg").astype(int) - noise()).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_exif_orientation_is_applied(tmp_path, ending, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    path = save(tmp_path / f"a.{ending}", noise(), exif=exif, **options)
    got = reading.read_picture(path)
    tagged = Image.fromarray(noise())
    tagged.getexif()[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(tagged))
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected).max() <= (25 if ending == "jpg" else 0)
    assert ending == "png" or reading.header_size(path) == expected.shape[:2]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_spoilt_exif_block_does_not_cost_the_picture(tmp_path):
    path = save(tmp_path / "a.jpg", noise(), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(9))
    assert reading.read_picture(path).shape == (24, 32, 3)


def test_first_frame_of_several(tmp_path):
    frames = [Image.fromarray(noise(seed=i)) for i in range(3)]
    for ending, options in (("tif", {}), ("webp", {"lossless": True})):
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(reading.read_picture(tmp_path / f"a.{ending}"), noise(seed=0))


@pytest.mark.parametrize("ending", KINDS)
def test_a_cut_body_under_a_good_header_is_found(tmp_path, ending):
    random = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(random).save(buffer, {"tif": "TIFF", "jpg": "JPEG"}.get(ending, ending.upper()))
    path = tmp_path / f"a.{ending}"
    path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * 0.6)])
    if ending in ("png", "jpg", "bmp"):  # of the others Pillow reads more than the first bytes to open them
        assert reading.header_size(path) == (64, 64)
    with pytest.raises(UnreadableError) as error:
        reading.read_picture(path)
    assert str(error.value).startswith(f"{path}: this file cannot be read as a picture (")
    assert "\n" not in str(error.value)


def test_files_that_are_no_pictures(tmp_path):
    for name, content in {"empty.png": b"", "text.jpg": b"hello"}.items():
        path = tmp_path / name
        path.write_bytes(content)
        for read in (reading.read_picture, reading.header_size, reading.read_label):
            with pytest.raises(UnreadableError) as error:
                read(path)
            assert str(error.value) == (
                f"{path}: this file cannot be read as a picture (empty, or not a kind of picture that is known)"
            )
    path = save(tmp_path / "float.tif", np.ones((4, 4), np.float32))
    with pytest.raises(UnreadableError) as error:
        reading.read_picture(path)
    assert str(error.value) == (
        f"{path}: this file cannot be read as a picture (float values; name their range in "
        "data.value_range=[low,high] or auto, or save it with 8 or 16 bit)"
    )


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UnreadableError("a.png", "cut")))
    assert (error.file, error.reason) == ("a.png", "cut")
    assert str(error) == "a.png: this file cannot be read as a picture (cut)"


def test_names():
    assert reading.is_picture("A.JPG")
    assert not reading.is_picture("._a.jpg")
    assert reading.is_picture("a.gif")
    assert not reading.is_picture("a.eps")
    assert not reading.is_picture("jpg")


# ---- labels ----


def test_labels_of_every_kind_keep_their_ids(tmp_path):
    ids = np.array([[0, 1, 2], [255, 7, 30]], np.uint8)
    save(tmp_path / "l.png", ids)
    palette = Image.fromarray(ids)
    palette.putpalette([7, 7, 7] * 256)
    palette.save(tmp_path / "p.png")
    save(tmp_path / "deep.png", ids.astype(np.uint16))
    Image.fromarray(ids > 1).save(tmp_path / "one.png")
    for name in ("l", "p", "deep"):
        np.testing.assert_array_equal(reading.read_label(tmp_path / f"{name}.png"), ids)
    np.testing.assert_array_equal(reading.read_label(tmp_path / "one.png"), ids > 1)


def test_a_colour_label_is_refused(tmp_path):
    path = save(tmp_path / "a.png", noise())
    with pytest.raises(DataError) as error:
        reading.read_label(path)
    assert not isinstance(error.value, UnreadableError)
    assert str(error.value) == (
        f"{path}: a label holds one class id per pixel, but this is a picture of mode RGB; save the ids as a grey or "
        "palette png of 8 or 16 bit"
    )


def test_a_label_of_another_size():
    with pytest.raises(DataError) as error:
        reading.check_size(np.zeros((4, 6), np.uint8), "l.png", np.zeros((4, 5, 3)), "p.jpg")
    assert str(error.value) == (
        "l.png: the label is 6x4 pixels (width x height) but its picture p.jpg is 5x4; save the label at the picture's "
        "own size"
    )
    with pytest.raises(DataError, match="perhaps the picture is turned by its EXIF orientation and the label is not"):
        reading.check_size(np.zeros((5, 4), np.uint8), "l.png", np.zeros((4, 5, 3)), "p.jpg")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 0}', "holds a dict"),
        ("[1, 2]", "holds a list of 2"),
        ("[" + ", ".join(['"x"'] * 256) + "]", "holds a list of 256"),
    ],
)
def test_class_lists(tmp_path, text, found):
    path = tmp_path / "classes.json"
    assert reading.read_classes(path) == ()
    path.write_text("[]")
    assert reading.read_classes(path) == ()
    path.write_text('["sky", "road"]')
    assert reading.read_classes(path) == ("sky", "road")
    path.write_text(text)
    with pytest.raises(DataError) as error:
        reading.read_classes(path)
    rule = 'it must be a list of at most 255 class names in id order, such as ["sky", "road"]'
    assert str(error.value) == f"{path}: {found}; {rule}"
    path.write_text("[,")
    with pytest.raises(DataError, match="cannot be read as json"):
        reading.read_classes(path)
