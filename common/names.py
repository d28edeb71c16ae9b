"""Names that other people gave, of files, classes and runs: shown without harm, and names of results made from them.

A file name may hold any byte but "/" and zero, also line ends, escape sequences that a terminal obeys, and bytes that
are no UTF-8, which Python keeps as lone surrogates that no text file and no picture takes.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import PurePosixPath

LONGEST = 240
"""Bytes of a name of a result, at most: file systems end at 255, and an ending and a mark of unfinished work follow."""

UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, separators of lines, what turns the direction of writing, and lone surrogates."""
SURROGATES = re.compile("[\ud800-\udfff]")


def shown(text: object, keep: str = "") -> str:
    r"""A text for terminals, pages and pictures: what cannot be shown becomes a backslash escape, as `\x1b` or `\n`.

    Bytes that are no UTF-8 become `\xe9`, as they are in the file's name. keep: characters to leave as they are.
    """
    return UNSHOWN.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), str(text))


def written(text: str) -> str:
    """A text for a file in UTF-8: lone surrogates alone are escaped, as `shown` does it."""
    return SURROGATES.sub(lambda found: _escaped(found[0]), text)


def octets(text: str) -> bytes:
    """Bytes of any text, to be hashed: UTF-8, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python keeps the byte of a name that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def of_results(files: Sequence[str], ending: str = ".png") -> list[str]:
    """A name for what is made from each of some files (relative paths with "/"): unique, and safe as a file name.

    It is the path without its ending, or with it where that would be the name of another's result or, with `ending`,
    of a folder of results; `~2` and so on where even that is taken.
    """
    paths = [_short(shown(file)) for file in files]
    stems = [os.path.splitext(path)[0] for path in paths]
    times, whole = Counter(stems), set(paths)
    folders = {str(parent) for path in paths for parent in PurePosixPath(path).parents}
    found: dict[str, None] = {}
    for path, stem in zip(paths, stems, strict=True):
        alone = times[stem] == 1 and stem not in whole and stem + ending not in folders
        name = base = stem if alone else path
        number = 1
        while name in found or name + ending in folders:
            number += 1
            name = f"{base}~{number}"
        found[name] = None
    return list(found)


def _short(path: str) -> str:
    """A path whose parts fit into a file system; what was cut out is told by a hash."""
    parts = []
    for part in path.split("/"):
        if len(octets(part)) > LONGEST:
            mark = blake2b(octets(part), digest_size=4).hexdigest()
            stem, ending = os.path.splitext(part)
            part = f"{octets(stem)[: LONGEST - 19].decode('utf-8', 'ignore')}~{mark}{ending[-10:]}"
        parts.append(part)
    return "/".join(parts)


class Lines(logging.Formatter):
    """Messages of a log with names made harmless; line ends and tabs stay, as tables need them."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record), keep="\n\t")
