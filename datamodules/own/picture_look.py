"""A look at pictures before they are used: values of more than 8 bits, fourth bands, further pages.

The first bytes of up to `HEADERS` files in a keyed order are read, the same ones every time, and a few are decoded.
"""

import logging
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from common import chance
from datamodules.base.listed import Entry
from datamodules.files import ranges
from datamodules.files.opening import opened
from datamodules.files.ranges import FULL, KEY, Range
from datamodules.files.reading import is_alpha

log = logging.getLogger(__name__)

HEADERS = 500
"""Files whose first bytes are read."""
DECODED = 64
"""Pictures of more than 8 bits, and tifs of four bands, that are decoded, each."""
VALUES = 20_000
"""Values that are kept of a picture, evenly spread."""
SMALL = 0.3
"""Share of the range of 16 bits below which its use is said."""
MIDDLE = (0.1, 99.9)
"""Percentiles between which values count as used."""


@dataclass
class Seen:
    """What the pictures looked at are."""

    deep: list[str] = field(default_factory=list)
    samples: list[np.ndarray] = field(default_factory=list)
    banded: list[str] = field(default_factory=list)
    """Tifs with a band beside colour, or grey, that is no transparency."""
    paged: list[str] = field(default_factory=list)


def settle(entries: list[Entry], wanted: Range | str | None, settable: bool = True) -> Range | None:
    """Say what is worth a line about these pictures; the range of values to read them with.

    wanted: `data.value_range`; `auto` gives percentiles of these pictures, None where none has more than 8 bits.
    settable: whether the key can be set here. Raises DataError where `auto` finds a single value.
    """
    seen = look(entries)
    if rank_zero_only.rank == 0:
        say(seen, wanted, settable)
    if wanted != "auto":
        return wanted
    return ranges.percentiles(seen.samples) if seen.samples else None


def look(entries: list[Entry]) -> Seen:
    """Sort the pictures; what cannot be read is left to the reader."""
    seen, tifs = Seen(), 0
    for entry in sorted(entries, key=lambda entry: chance.key(0, f"picture_look/{entry.id}"))[:HEADERS]:
        try:
            with opened(entry.picture) as image:
                if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                    image.seek(0)
                    seen.paged.append(entry.picture)
                if image.format == "TIFF" and _further_band(image, decode=tifs < DECODED):
                    seen.banded.append(entry.picture)
                tifs += image.format == "TIFF" and image.mode in ("RGBA", "LA")
            with opened(entry.picture) as image:
                if ranges.is_deep(image):
                    seen.deep.append(entry.picture)
                    if len(seen.samples) < DECODED:
                        seen.samples.append(_sample(image))
        except Exception as error:
            log.debug("%s: not looked at (%s)", entry.picture, error)
    return seen


def say(seen: Seen, wanted: Range | str | None, settable: bool) -> None:
    """A line for each kind of thing."""
    if wanted == "auto":
        say_auto(seen)
    if seen.samples and wanted is None:
        say_range(seen, settable)
    if seen.banded:
        log.warning(
            "%s%s: a band beside the colours is no transparency (such as infrared) and is left out",
            seen.banded[0], _more(seen.banded),
        )  # fmt: skip
    if seen.paged:
        log.warning(
            "%s%s: holds several pages, and the first alone is read; save pages as files of their own to use them",
            seen.paged[0], _more(seen.paged),
        )  # fmt: skip


def say_auto(seen: Seen) -> None:
    """What `auto` chooses."""
    if not seen.samples:
        log.info("%s=auto: no training picture looked at has more than 8 bits; nothing is scaled", KEY)
        return
    log.info(
        "%s=auto: %g becomes 0 and %g 255 (percentiles %g and %g of %d training pictures)",
        KEY, *ranges.percentiles(seen.samples), *ranges.PERCENTILES, len(seen.samples),
    )  # fmt: skip


def say_range(seen: Seen, settable: bool) -> None:
    """A line where the values use a small part of 16 bits."""
    together = np.concatenate([sample.ravel() for sample in seen.samples])
    low, high = np.percentile(together, MIDDLE)
    if together.dtype.kind == "f" or together.min() < 0 or together.max() > FULL:
        chosen = [float(f"{value:.6g}") for value in (low, high)] if low < high else [0, 1]
    elif high - low <= SMALL * FULL:
        bits = next(bits for bits in range(8, 17) if high < 2**bits)
        chosen = [0, 2**bits - 1] if low < 2 ** (bits - 2) or low >= high else [int(low), int(np.ceil(high))]
    else:
        return
    way = (
        f"set {KEY}=[{chosen[0]},{chosen[1]}] (what becomes 0 and 255), or {KEY}=auto for percentiles of the training "
        "pictures"
        if settable
        else "save them with 8 bits, scaled as the training pictures were"
    )
    log.warning(
        "%s%s: values of more than 8 bits, %g to %g, where 0..%d is read: %s; %s",
        seen.deep[0], _more(seen.deep), low, high, FULL,
        "nearly black or lost" if together.dtype.kind == "f" or low < 0 else "dark, with few grey levels", way,
    )  # fmt: skip


def _more(paths: list[str]) -> str:
    return f" and {len(paths) - 1} more" if len(paths) > 1 else ""


def _sample(image: Any) -> np.ndarray:
    """Some values of an open picture of more than 8 bits, without its transparency; none that is no number or void."""
    void = _void(image)
    values = ranges.values(image)
    if values.ndim == 3:
        values = values[..., : 3 if values.shape[2] > 2 else 1]
    values = values[np.isfinite(values)]
    values = values if void is None else values[values != void]
    return values[:: max(1, values.size // VALUES)]


def _void(image: Any) -> float | None:
    """The value that a tif of GDAL gives to places without data."""
    try:
        return float(image.tag_v2.get(42113))
    except (AttributeError, TypeError, ValueError):
        return None


def _further_band(image: Any, decode: bool) -> bool:
    """Whether an open tif has a band beside grey or colour that is no transparency."""
    raw = ranges.raw_mode(image)
    if "X" in raw:
        return True
    if image.mode not in ("RGBA", "LA") or not decode:
        return False
    image.tile = [tile._replace(args=ranges.plain_bands(tile.args)) for tile in image.tile]
    bands = ranges.values(image) if ranges.is_deep(image) else _loaded(image)
    return not is_alpha(bands[..., -1])


def _loaded(image: Any) -> np.ndarray:
    image.load()
    return np.asarray(image)
