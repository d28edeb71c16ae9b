"""The one place where a picture file is opened: plain files alone, by decoders that work inside this process alone.

Pillow looks at what a file holds and not at its ending, and two of its kinds are handed to other programs or to
whatever has registered for them: PostScript starts Ghostscript on the file's content, WMF a drawing library of the
system. So kinds are declared here, and nothing else is tried, whatever a file is called.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

KINDS = {
    "AVIF": (".avif",),
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jfif", ".jpe", ".jpeg", ".jpg"),
    "JPEG2000": (".j2c", ".j2k", ".jp2", ".jpc", ".jpf", ".jpx"),
    "PCX": (".pcx",),
    "PNG": (".apng", ".png"),
    "PPM": (".pbm", ".pgm", ".pnm", ".ppm"),
    "QOI": (".qoi",),
    "SGI": (".sgi",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
"""Kinds of pictures by Pillow's names, each told by its first bytes, and the endings of their files.

Left out of what Pillow knows: kinds that need another program (EPS, WMF) or a registered handler (BUFR, GRIB, HDF5),
that open what they contain by any decoder (IPTC), that hold no picture of the world (icons, cursors, textures, films),
and TGA, which has no first bytes of its own, so that any spoilt file could pass for one.
"""
FORMATS = (*KINDS, "DIB")
"""What is tried on a file, whatever its ending; DIB is a BMP without the header of its file."""
ENDINGS = tuple(sorted(ending for endings in KINDS.values() for ending in endings))
"""What counts as a picture, in any case of letters."""


class SpecialFileError(OSError):
    """Not a plain file: a pipe, a socket or a device, which may never end, or never begin."""


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """A picture file, whose pixels are not decoded yet; closed at the end.

    Raises what the decoders raise, UnidentifiedImageError for a file of no declared kind, and SpecialFileError.
    """
    plain(path)
    with Image.open(path, formats=FORMATS) as image:
        yield image


def plain(path: str | Path) -> None:
    """Raises SpecialFileError for what is no plain file, links followed; FileNotFoundError for what is not there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        known = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise SpecialFileError(f"{known.get(stat.S_IFMT(mode), 'a device')}, not a plain file")


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words and on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "empty, or not a kind of picture that is known"
    return " ".join(str(error).split()) or type(error).__name__
