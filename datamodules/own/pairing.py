"""Which label belongs to which picture: that of the same relative path, but for the ending and for named suffixes.

Names are compared in Unicode's composed form (NFC): some systems write an accent as a letter of its own. Whatever finds
no partner is counted and named, because a label that is not used is missing from every score.
"""

import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from common.errors import DataError
from datamodules.files.walking import files_below

log = logging.getLogger(__name__)

LABEL_ENDINGS = (".bmp", ".png", ".tif", ".tiff")
"""Kinds of files that keep every value, in any case of letters."""
LOSSY = (".jfif", ".jpe", ".jpeg", ".jpg", ".webp")
"""Kinds of files that blur values, or may do."""
NAMED = 3
"""Files that a line names."""


def is_label(name: str) -> bool:
    """True for the file endings of `LABEL_ENDINGS`; names that begin with a dot are other programs' leftovers."""
    return name.lower().endswith(LABEL_ENDINGS) and not name.startswith(".")


def pair(
    folder: Path, pictures: list[str], labels: Path | None, image_suffix: str = "", label_suffix: str = ""
) -> dict[str, str]:
    """{picture: path of its label} of those pictures, relative to `folder`, that have one below `labels`.

    Raises DataError where no label belongs to any picture, where two belong to one, or where labels are kept in a kind
    of file that blurs values.
    """
    if labels is None or not labels.is_dir():
        return {}
    stems = {stem: name for name in pictures if (stem := _stem(name, image_suffix)) is not None}
    files = files_below(labels, lambda name: is_label(name) and _ends(name, label_suffix))
    by_stem: dict[str, str] = {}
    for name in files:
        stem = _stem(name, label_suffix)
        if stem in by_stem and stem in stems:
            raise DataError(
                f"{labels / by_stem[stem]}: a second label, {labels / name}, belongs to the same picture; keep one"
            )
        by_stem[stem] = name
    _refuse_lossy(labels, {stem for stem in stems if stem not in by_stem}, label_suffix)
    if not files and (others := other_files([labels])):
        _say("%s: holds no label, which would be a png, tif or bmp file, but %s", labels, others)
    paired = {name: str(labels / by_stem[stem]) for stem, name in _each(pictures, image_suffix) if stem in by_stem}
    left = [name for stem, name in sorted(by_stem.items()) if stem not in stems]
    if by_stem and not paired:
        first = _stem(pictures[0], image_suffix) or os.path.splitext(pictures[0])[0]
        raise DataError(
            f"{labels}: holds {len(files)} labels, but none is named after a picture of {folder}; the label of "
            f"{folder / pictures[0]} would be {labels / first}{label_suffix}.png{_hint(left, stems, len(paired))}"
        )
    if left:
        _say(
            "%s: %d of %d labels belong to no picture of %s and are not used: %s%s",
            labels, len(left), len(files), folder, named(left), _hint(left, stems, len(paired)),
        )  # fmt: skip
    lacking = [name for name in pictures if name not in paired]
    if paired and lacking and len(paired) >= len(lacking):
        _say(
            "%s: %d of %d pictures have no label in %s, so nothing is scored on them: %s",
            folder, len(lacking), len(pictures), labels, named(lacking),
        )  # fmt: skip
    return paired


def other_files(folders: Iterable[Path]) -> str:
    """What folders of labels hold that is no label, in words: `3 of .npy, 1 of .xml`; else an empty text."""
    counted: Counter[str] = Counter()
    for folder in folders:
        files = files_below(folder, lambda name: not name.startswith(".") and not is_label(name))
        counted.update(os.path.splitext(name)[1].lower() or "no ending" for name in files)
    return ", ".join(f"{count} of {ending}" for ending, count in counted.most_common(NAMED))


def named(names: list[str]) -> str:
    """The first of a list of names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"


def _say(line: str, *facts: object) -> None:
    if rank_zero_only.rank == 0:  # every process looks, and one says
        log.warning(line, *facts)


def _each(names: list[str], suffix: str) -> list[tuple[str, str]]:
    return [(stem, name) for name in names if (stem := _stem(name, suffix)) is not None]


def _stem(name: str, suffix: str) -> str | None:
    """The relative path without ending and suffix, composed; None without that suffix."""
    stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])
    suffix = unicodedata.normalize("NFC", suffix)
    return stem.removesuffix(suffix) if stem.endswith(suffix) else None


def _ends(name: str, suffix: str) -> bool:
    return _stem(name, suffix) is not None


def _refuse_lossy(labels: Path, wanted: set[str], suffix: str) -> None:
    """Raises DataError where the only label of a picture is a jpg."""
    for name in files_below(labels, lambda name: name.lower().endswith(LOSSY) and not name.startswith(".")):
        if _stem(name, suffix) in wanted:
            ending = os.path.splitext(name)[1].lower()
            raise DataError(
                f"{labels / name}: a label in {ending} has lost its ids: this kind of file blurs values at every "
                "border; write the labels anew as png, tif or bmp, from where they were drawn, or set data.labels=none"
            )


def _hint(left: list[str], stems: dict[str, str], paired: int) -> str:
    """`data.label_suffix=…`, where one suffix pairs more of the labels than are paired now."""
    suffixes: Counter[str] = Counter()
    for name in left:
        stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])
        fitting = [end for end in range(len(stem) - 1, 0, -1) if stem[:end] in stems and not stem[end].isalnum()]
        suffixes.update(stem[end:] for end in fitting[:1])
    if not suffixes:
        return ""
    suffix, count = min(suffixes.items(), key=lambda item: (-item[1], item[0]))
    if count > paired:
        return f"; data.label_suffix={suffix} pairs {count} of them"
    return f"; {count} would fit without {suffix} at the end of their names"
