"""The one place where a picture file is opened: plain files alone, by decoders that work inside this process alone.

Pillow looks at what a file holds and not at its ending, and two of its kinds are handed to other programs or to
whatever has registered for them: PostScript starts Ghostscript on the file's content, WMF a drawing library of the
system. So kinds are declared here, and nothing else is tried, whatever a file is called.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common import memory
from common.files import size_text

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
SMALL = 1 << 24
"""Pixels below which nobody asks for the free memory."""
BYTES = 10
"""Of memory for each pixel: decoded, as RGB, and a copy or overlay."""


class SpecialFileError(OSError):
    """Not a plain file: a pipe, a socket or a device, which may never end, or never begin."""


@contextmanager
def opened(path: str | Path, whole: bool = True) -> Iterator[Image.Image]:
    """A picture file, whose pixels are not decoded yet; closed at the end. whole: they are going to be.

    Raises what the decoders raise, UnidentifiedImageError for a file of no declared kind, SpecialFileError, and
    MemoryError, before any is taken, where there is too little for the pixels.
    """
    plain(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half of the limit that is kept
        image = Image.open(path, formats=FORMATS)
    with image:
        pixels = image.width * image.height
        if whole and pixels > SMALL:
            room = memory.free()
            if room is not None and BYTES * pixels > room:
                raise MemoryError(
                    f"{pixels / 1e6:.0f} million pixels need about {size_text(BYTES * pixels)} of memory, and "
                    f"{size_text(max(0, room))} are free"
                )
        yield image


def plain(path: str | Path) -> None:
    """Raises SpecialFileError for what is no plain file, links followed; FileNotFoundError for what is not there."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        known = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise SpecialFileError(f"{known.get(stat.S_IFMT(mode), 'a device')}, not a plain file")


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words and on one line."""
    if isinstance(error, OverflowError) or (isinstance(error, MemoryError) and not str(error)):
        return "it needs more memory than there is"
    if isinstance(error, UnidentifiedImageError):
        return "empty, or not a kind of picture that is known"
    return " ".join(str(error).split()) or type(error).__name__
