"""Files to arrays: pictures of any common kind as uint8 RGB, label pngs as class ids.

Rules, the same for every picture: the EXIF orientation is applied; palettes, CMYK and other colour spaces become RGB as
Pillow converts them; transparency is laid on white, as viewers show it; 16-bit grey is divided by 257 and rounded, so
65535 becomes 255 (16-bit colour keeps its high byte, which Pillow reads: one level of difference at most), unless a
range of values is given (`ranges.py`); a band of a tif beside its colours that is no transparency is left out; of
several frames or pages the first is taken. Everything is decoded to the end: a header can be good where the body is
cut.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import loadmat

from common.errors import DataError
from common.formats import trees
from common.names import octets, shown
from datamodules.files import opening
from datamodules.files.opening import ENDINGS, opened
from datamodules.files.orientation import orientation, upright
from datamodules.files.ranges import Range, in_planes, is_deep, plain_bands, raw_mode, sixteen_bits, to_bytes, values


class UnreadableError(DataError):
    """A file that cannot be decoded: named, counted and skipped, unless there are too many (`data.max_broken`)."""

    def __init__(self, file: str | Path, reason: str) -> None:
        super().__init__(f"{shown(file)}: this file cannot be read as a picture ({shown(reason)})")
        self.file = str(file)
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.file, self.reason)


class WindowsOnlyError(UnreadableError):
    """A picture that is sound, but too large, or too long and thin, to be seen as a whole."""

    def __init__(self, file: str | Path, reason: str) -> None:
        DataError.__init__(
            self,
            f"{shown(file)}: {reason}; cut it into parts, or let predict see it by windows (predict.window=<pixels>)",
        )
        self.file = str(file)
        self.reason = reason


def unreadable(path: str | Path, error: Exception) -> UnreadableError:
    """What a decoder said, as the error of its file."""
    if isinstance(error, Image.DecompressionBombError):
        count = re.search(r"\((\d+) pixels\)", str(error))
        many = f"{int(count[1]) / 1e6:.0f} million" if count else "its"
        most = 2 * Image.MAX_IMAGE_PIXELS / 1e6
        return WindowsOnlyError(path, f"{many} pixels are more than the {most:.0f} million that are read as a whole")
    return UnreadableError(path, opening.reason(error))


def is_picture(name: str) -> bool:
    """True for the file endings of `ENDINGS`; names that begin with a dot are other programs' leftovers."""
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def read_picture(path: str | Path, value_range: Range | None = None, channels: int = 3) -> np.ndarray:
    """The picture as uint8 [H,W,3], as a viewer shows it. Raises UnreadableError.

    value_range: the values that become 0 and 255, of pictures of more than 8 bits; None: 0 and 65535. channels: 4:
    uint8 [H,W,4], the four bands of the file as they are, infrared where others have transparency.
    """
    try:
        with opened(path) as image:
            return _whole(image, value_range) if channels == 3 else _four_bands(image, value_range)
    except Exception as error:  # the decoders raise whatever they like: OSError, SyntaxError, struct.error, …
        raise unreadable(path, error) from error


def read_label(path: str | Path, what: str = "a label holds one class id per pixel") -> np.ndarray:
    """Class ids as they stand in a file: uint8 or int32 [H,W]; palette files give their indices, not their colours.
    Colour files whose channels are alike, and float files of whole numbers, say the same as grey ones.
    `what`: how the error for a colour picture begins.

    Raises UnreadableError for a broken file, DataError for a colour picture.
    """
    try:
        with opened(path) as image:
            deep = is_deep(image)
            image.load()
            mode = image.mode
            if mode in ("L", "P", "1"):
                return np.asarray(image).astype(np.uint8)
            if mode == "I" or mode.startswith("I;16"):
                return np.asarray(image).astype(np.int32)
            found = _ids(image, deep)
            if found is not None:
                return found
    except Exception as error:
        raise unreadable(path, error) from error
    raise DataError(
        f"{path}: {what}, but this is a picture of mode {mode}; save the ids as a grey or palette png of 8 or 16 bit"
    )


def read_first_channel(path: str | Path) -> np.ndarray:
    """uint8 [H,W]: red of an RGB png, where KITTI-STEP keeps the class. Raises UnreadableError, DataError."""
    try:
        with opened(path) as image:
            image.load()
            if image.mode in ("RGB", "RGBA"):
                return np.asarray(image)[..., 0]
            mode = image.mode
    except Exception as error:
        raise unreadable(path, error) from error
    raise DataError(
        f"{path}: a panoptic map is an RGB png with the class in its red channel, but this is a picture of mode {mode}"
    )


def read_mat(path: str | Path, variable: str) -> np.ndarray:
    """The array of one variable of a MATLAB file; of a struct with the field Segmentation (SBD), that field.

    Raises UnreadableError for a file that is absent, cut, or without the variable.
    """
    try:
        opening.plain(path)
        found = loadmat(path, variable_names=[variable])
        value = found[variable]
        if value.dtype.names:
            value = value["Segmentation"][0, 0]
    except KeyError as error:
        raise UnreadableError(path, f"it holds no variable {error.args[0]}") from error
    except Exception as error:
        raise unreadable(path, error) from error
    if value.ndim not in (2, 3) or value.size == 0:
        raise UnreadableError(path, f"{variable} is no picture but an array of shape {value.shape}")
    return value


def header_size(path: str | Path) -> tuple[int, int]:
    """(height, width) as displayed, from the first bytes of a file: fast, but no proof that the body is whole.

    A png whose orientation stands behind its pixels is taken as it lies. Raises UnreadableError.
    """
    try:
        with opened(path, whole=False) as image:
            width, height = image.size
            # Pillow turns a tif itself, and would decode a whole png to find its orientation
            turned = image.format not in ("PNG", "TIFF") and orientation(image) >= 5
            return (width, height) if turned else (height, width)
    except Exception as error:
        raise unreadable(path, error) from error


def check_size(label: np.ndarray, path: str | Path, image: np.ndarray, picture: str | Path) -> None:
    """Raises DataError, naming both files, for a label of another size than its picture."""
    if label.shape != image.shape[:2]:
        raise DataError(
            f"{path}: the label is {_pixels(label)} pixels (width x height) but its picture {picture} is "
            f"{_pixels(image)}; save the label at the picture's own size{_hint(label, image)}"
        )


def read_classes(path: str | Path) -> tuple[str, ...]:
    """The names of a classes.json, in id order; none where the file is absent or its list empty. Raises DataError."""
    path = Path(path)
    if not path.exists():
        return ()
    rule = 'it must be a list of at most 255 class names in id order, such as ["sky", "road"]'
    try:
        names = trees.json_of(path)
    except (OSError, trees.TreeError) as error:
        raise DataError(f"{path}: cannot be read as json ({opening.reason(error)}); {rule}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > 255:
        found = f"a list of {len(names)}" if isinstance(names, list) else f"a {type(names).__name__}"
        raise DataError(f"{path}: holds {found}; {rule}")
    names = [name.strip() for name in names]  # line ends of a list from Windows, too
    for number, name in enumerate(names):
        if not name or name != shown(name):
            raise DataError(
                f"{path}: name {number} is {json.dumps(name)}; a name must hold a character that can be shown, and no "
                "control characters"
            )
    return tuple(names)


def turned(path: str | Path) -> bool:
    """Whether an orientation tag at the beginning of a file turns the picture; False for one that cannot be read."""
    try:
        with opened(path, whole=False) as image:
            # Pillow would decode a whole png to find a tag behind its pixels
            return (image.format != "PNG" or "exif" in image.info) and orientation(image) != 1
    except Exception:  # named when it is read
        return False


def _ids(image: Image.Image, deep: bool) -> np.ndarray | None:
    """Ids [H,W] of a file of colours or floats that says the same as a grey one; None for any other.
    `deep`: it had more than 8 bits a channel, of which Pillow keeps 8."""
    values = np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        colours = values[..., :3] if image.mode != "LA" else values[..., :1]
        alike, opaque = (colours == colours[..., :1]).all(), image.mode == "RGB" or (values[..., -1] == 255).all()
        return np.ascontiguousarray(colours[..., 0]) if alike and opaque and not deep else None
    if image.mode == "F":
        whole = np.isfinite(values).all() and (values == np.round(values)).all() and np.abs(values).max() < 2**31
        return values.astype(np.int32) if whole else None
    return None


def _whole(image: Image.Image, value_range: Range | None) -> np.ndarray:
    """An open picture, not yet decoded, as uint8 [H,W,3]."""
    deep = is_deep(image) and (value_range is not None or not image.mode.startswith("RGB") or in_planes(image))
    tif = image.format == "TIFF"
    if not deep:
        if tif and raw_mode(image).startswith("RGBa"):  # Pillow would divide by the band before it is looked at
            return _straight(image)
        image.load()
        return _rgb(upright(image), tif)
    bands, coloured = values(image), image.mode.startswith("RGB")
    found = sixteen_bits(bands) if value_range is None else to_bytes(bands, value_range)
    if found.ndim == 2:
        return np.repeat(found[..., None], 3, axis=2)
    if found.shape[2] == 4 and not (tif and not is_alpha(bands[..., 3])):
        found[..., 3] = bands[..., 3] >> 8
        return _rgb(Image.fromarray(found))
    return np.ascontiguousarray(found[..., :3]) if coloured else np.repeat(found[..., :1], 3, axis=2)


def _four_bands(image: Image.Image, value_range: Range | None) -> np.ndarray:
    """An open picture of four bands, not yet decoded, as uint8 [H,W,4]; none of them is taken for transparency."""
    count = len(image.getbands())
    if count != 4 or image.mode == "CMYK":
        raise OSError(f"it has {count} bands of mode {image.mode}; data.channels=4 needs red, green, blue and infrared")
    if is_deep(image) and (value_range is not None or in_planes(image)):
        bands = values(image)
        return np.ascontiguousarray(sixteen_bits(bands) if value_range is None else to_bytes(bands, value_range))
    if image.format == "TIFF" and raw_mode(image).startswith("RGBa"):  # Pillow would divide by the fourth band
        with opened(image.filename) as again:
            return _plain(again)
    image.load()
    return np.array(upright(image))


def _plain(image: Image.Image) -> np.ndarray:
    """The four bands of an open tif as they stand in the file, uint8 [H,W,4]."""
    image.tile = [tile._replace(args=plain_bands(tile.args)) for tile in image.tile]
    image.load()
    return np.asarray(upright(image))


def _rgb(image: Image.Image, tif: bool = False) -> np.ndarray:
    """A decoded picture, upright, as uint8 [H,W,3]. `tif`: a fourth band may be no transparency."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if tif and image.mode in ("RGBA", "LA") and not is_alpha(np.asarray(image)[..., -1]):
        return np.asarray(image.convert(image.mode[:-1]).convert("RGB"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.asarray(image.convert("RGB"))


def _straight(image: Image.Image) -> np.ndarray:
    """A tif whose colours are multiplied with its fourth band, if that is transparency, as uint8 [H,W,3]."""
    with opened(image.filename) as again:
        bands = _plain(again)
    if not is_alpha(bands[..., 3]):
        return np.ascontiguousarray(bands[..., :3])
    image.load()
    return _rgb(upright(image))


def is_alpha(band: np.ndarray) -> bool:
    """Whether a fourth band can be transparency: most of it holds two values at most, as opaque and clear."""
    counts = np.bincount(band.ravel())
    return np.sort(counts)[-2:].sum() >= band.size / 2


def _pixels(array: np.ndarray) -> str:
    return f"{array.shape[1]}x{array.shape[0]}"


def _hint(label: np.ndarray, image: np.ndarray) -> str:
    if label.shape == image.shape[1::-1]:
        return " (sides are swapped: perhaps the picture is turned by its EXIF orientation and the label is not)"
    return ""


def fingerprint(facts: str, source: Any) -> str:
    """Names the pictures of a source, and what else counts, for files that hold what was computed from them.

    sha256, hexadecimal, of `facts`, the own fingerprint of the source where it has one, and the id of every picture,
    in order.
    """
    own = source.fingerprint() if hasattr(source, "fingerprint") else ""
    found = hashlib.sha256(octets(f"{facts} {own}"))
    for index in range(len(source)):
        found.update(octets(f"\n{source.id(index)}"))
    return found.hexdigest()
