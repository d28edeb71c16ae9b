"""Pictures of more than 8 bits: which of their values becomes 0, and which 255.

Scanners, microscopes and satellites write 10 to 14 bits into files of 16. Read over the whole range of 16 bits they are
nearly black, with few grey levels left. `data.value_range=[low,high]` says which values count; `auto` takes percentiles
of the training pictures. One range serves all pictures and all bands, so that brightness and colour keep their meaning.
"""

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np
from PIL import Image

from common.errors import ConfigError, DataError
from datamodules.files.opening import opened
from datamodules.files.orientation import upright

KEY = "data.value_range"
FULL = 65535
"""The highest value of 16 bits: what becomes 255 without a range."""
PERCENTILES = (0.5, 99.5)
"""Of the training pictures' values, which `auto` takes for low and high."""
LOW_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
"""Pillow keeps the high byte of 16-bit colour; told the other order of bytes, it keeps the low one."""

Range = tuple[float, float]


def parse(given: Any) -> Range | str | None:
    """(low, high), `auto`, or None. Raises ConfigError."""
    if given is None or given == "auto":
        return given
    values = list(given) if not isinstance(given, str) and isinstance(given, Iterable) else []
    sound = len(values) == 2 and all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
    if not sound or not np.isfinite(values).all() or values[0] >= values[1]:
        raise ConfigError(
            f"{KEY}={given}: expected [low,high], the values of pictures of more than 8 bits that become 0 and 255, "
            "auto, or null for all 16 bits"
        )
    return float(values[0]), float(values[1])


def kept(data: Any) -> Range | None:
    """The range of the `data.*` keys of a trained run. Raises ConfigError for `auto`, which training settles."""
    found = parse(data.get("value_range"))
    if found == "auto":
        raise ConfigError(f"{KEY}=auto: only training chooses a range; leave it out for that of the run, or name one")
    return found


def is_deep(image: Image.Image) -> bool:
    """Whether a file holds more than 8 bits a channel; asked before its pixels are decoded."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16") or ";16" in raw_mode(image) or in_planes(image)


def in_planes(image: Image.Image) -> bool:
    """A tif whose 16-bit bands lie one after the other, of which Pillow would make noise."""
    bits = getattr(image, "tag_v2", {}).get(258, (8,))
    return len(image.tile) > 1 and max(bits) > 8 and raw_mode(image) in ("R", "G", "B", "A", "X", "L")


def raw_mode(image: Image.Image) -> str:
    """How the values of a picture lie in its file, by Pillow's name, such as RGB;16B; empty where it does not tell."""
    for tile in image.tile:
        return _raw(tile[3])
    return ""


def values(image: Image.Image) -> np.ndarray:
    """All bits of a deep picture that is open and not decoded: [H,W], or [H,W,C] with the bands of its mode; upright.

    Raises ValueError for a file whose bands lie apart, and what the decoders raise.
    """
    if in_planes(image):
        raise ValueError("its 16-bit bands lie one after the other; save it with the bands of a pixel side by side")
    if ";16" not in raw_mode(image) or image.mode.startswith("I") or image.mode == "F":
        image.load()
        return np.asarray(upright(image))
    tiles = [tile._replace(args=_swapped(tile.args)) for tile in image.tile]
    with opened(image.filename) as again:
        image.load()
        high = np.asarray(upright(image)).astype(np.uint16)
        again.tile = tiles
        try:
            again.load()
        except ValueError:  # grey with transparency, whose low bytes Pillow has no name for
            return high * 257
        return (high << 8) | np.asarray(upright(again))


def plain_bands(args: Any) -> Any:
    """Settings of a decoder that leave four bands as they are, in place of dividing three by the fourth."""
    raw = _raw(args).replace("RGBa", "RGBA")
    return raw if isinstance(args, str) else (raw, *args[1:])


def to_bytes(array: np.ndarray, chosen: Range) -> np.ndarray:
    """Values as uint8 of the same shape: low and less become 0, high and more 255, evenly between; no number is 0."""
    low, high = chosen
    scaled = (array.astype(np.float32) - low) * (255 / (high - low))
    return np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255).round().astype(np.uint8)


def sixteen_bits(array: np.ndarray) -> np.ndarray:
    """Values as uint8 where no range is set: 65535 becomes 255. Raises ValueError for what does not fit 16 bits."""
    if array.dtype.kind == "f":
        raise ValueError(f"float values; name their range in {KEY}=[low,high] or auto, or save it with 8 or 16 bit")
    array = array.astype(np.int64)
    if array.min() < 0 or array.max() > FULL:
        raise ValueError(
            f"values from {array.min()} to {array.max()}, outside 0..{FULL}; name their range in {KEY}=[low,high] or "
            "auto, or save it with 8 or 16 bit"
        )
    return ((array + 128) // 257).astype(np.uint8)


def percentiles(samples: list[np.ndarray]) -> Range:
    """What `auto` takes of the values of training pictures. Raises DataError where they are all alike."""
    together = np.concatenate([sample.ravel() for sample in samples])
    low, high = (float(value) for value in np.percentile(together, PERCENTILES))
    if low >= high:
        raise DataError(f"{KEY}=auto: the training pictures looked at hold one value, {low:g}; name a range")
    return (low, high) if together.dtype.kind == "f" else (float(np.floor(low)), float(np.ceil(high)))


def _raw(args: Any) -> str:
    found = args if isinstance(args, str) else args[0] if isinstance(args, tuple) and args else ""
    return found if isinstance(found, str) else ""


def _swapped(args: Any) -> Any:
    raw = _raw(args)
    changed = next((raw.replace(end, other) for end, other in LOW_BYTE.items() if raw.endswith(end)), raw)
    return changed if isinstance(args, str) else (changed, *args[1:])
