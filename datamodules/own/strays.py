"""Labels that lie among pictures under names that are not known: found before they are trained on.

A folder is looked at as a whole: files of one stem in different places (`photos/p0.jpg` and `truth/p0.png`), or beside
each other (`p0.jpg` and `p0_mask.png`), may be a picture and its label. What the files hold decides: labels are flat,
with few values, and pictures are not.
"""

import logging
import os
import unicodedata
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from common.errors import DataError
from datamodules.files.opening import opened
from datamodules.files.walking import files_below
from datamodules.own.instance_maps import FOLDER as OBJECTS
from datamodules.own.layouts import LABELS, SPLITS, without_split
from datamodules.own.pairing import is_label

log = logging.getLogger(__name__)

SUFFIXES = frozenset((
    "mask", "masks", "label", "labels", "labelids", "labeltrainids", "gtfine", "gt", "seg", "segmentation",
    "annotation", "annotated", "truth", "l", "leftimg8bit", "image", "img", "rgb",
))  # fmt: skip
"""What programs append to the names of pictures and of labels, in small letters, behind one of `SEPARATORS`."""
SEPARATORS = " _.-"
SAMPLE = 5
"""Pairs of files whose content is looked at."""
FLAT, FEW = 32, 8
"""A label has at most so many values, or so few that cover `COVERED` of it, as a jpg of a label has."""
COVERED = 0.8
MOST = 40
"""Pairs of folders whose files are looked at, those that share most names first."""
SIDE = 512
"""Pixels along a side that are looked at, evenly spread."""


def expect_none(folder: Path, pictures: list[str], root: Path, key: str) -> None:
    """Raises DataError where some of the `pictures` below `folder` are the labels of others. `key` named `root`.

    Two folders of pictures that share their names are said in a line.
    """
    called, others = [], []
    for name in pictures:
        (called if any(part in LABELS for part in name.lower().split("/")[:-1]) else others).append(name)
    if called and others and _labels_of(folder, list(zip(_spread(others), _spread(called), strict=False))) == 1:
        places = os.path.dirname(others[0]), os.path.dirname(called[0])
        raise _refusal(folder, root, key, places, (others[0], called[0]), labels=1)
    twins, below = _twins(pictures), _counts(pictures)
    for places, pairs in sorted(twins.items(), key=lambda item: -len(item[1]))[:MOST]:
        if places[0] != places[1] and len(pairs) < min(below[place] for place in places) / 2:
            continue
        labels = _labels_of(folder, pairs)
        if labels is not None:
            raise _refusal(folder, root, key, places, pairs[0], labels)
    alike = [pair for pair, names in twins.items() if pair[0] != pair[1] and len(names) > 1 and not _splits(pair)]
    if alike and rank_zero_only.rank == 0:
        one, other = max(alike, key=lambda pair: len(twins[pair]))
        log.warning(
            "%s: the folders %s and %s share the names of %d files, and all are taken as pictures; where one holds "
            "labels, set data.images=<folder of the pictures> and data.labels=<folder of the labels>",
            folder, one or ".", other or ".", len(twins[one, other]),
        )  # fmt: skip


def elsewhere(root: Path, folders: list[Path], pictures: list[str]) -> str:
    """The end of a line about missing labels: the folder outside those of pictures whose files are named after most of
    them; empty where there is none."""
    found = _named_after(root, folders, pictures)
    if not found:
        return ""
    place, pairs = found
    return f" ({len(pairs)} files of {place} are named after pictures: data.labels={place})"


def expect_read(root: Path, key: str, folders: list[Path], pictures: list[str]) -> None:
    """Raises DataError where a folder outside those of the `pictures` holds their labels under a name that is not
    known, so that nothing would be read of them. `key` named `root`."""
    found = _named_after(root, folders, pictures)
    if found and _labels_of(root, found[1]) == 1:
        place = found[0]
        raise DataError(
            f"{key}={root}: the files of {place} look like the labels of those in {_relative(folders[0], root)}, and "
            f"would not be read; set data.labels={place} and write the class names into {root / 'classes.json'}, or "
            "set data.labels=none"
        )


def _named_after(root: Path, folders: list[Path], pictures: list[str]) -> tuple[str, list[tuple[str, str]]] | None:
    """The folder outside `folders` most of whose label files are named after pictures, and these pairs, relative to
    `root`; None without any."""
    stems = {_bare(os.path.basename(name)): os.path.relpath(name, root) for name in pictures}
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name in files_below(root, is_label):
        outside = not any(folder in (root / name).parents for folder in folders) and OBJECTS not in name.split("/")[:-1]
        stem = _bare(os.path.basename(name))
        if outside and "/" in name and stem in stems:
            found[without_split(os.path.dirname(name))].append((stems[stem], name))
    return min(found.items(), key=lambda item: (-len(item[1]), item[0]), default=None)


def _labels_of(folder: Path, pairs: list[tuple[str, str]]) -> int | None:
    """Which side of the pairs holds labels, 0 or 1; None where neither does, or both look alike."""
    sample = _spread(pairs)
    flat = [sum(_flat(folder / pair[side]) for pair in sample) > len(sample) / 2 for side in (0, 1)]
    return None if flat[0] == flat[1] else int(flat[1])


def _spread(items: list) -> list:
    return items[:: max(1, len(items) // SAMPLE)][:SAMPLE]


def _refusal(
    folder: Path, root: Path, key: str, places: tuple[str, str], pair: tuple[str, str], labels: int
) -> DataError:
    picture, label = pair[1 - labels], pair[labels]
    if places[0] == places[1]:
        end = _suffix(picture, label)
        place = without_split(_relative(folder / places[0], root))
        place = "." if place.lower() in {name for names in SPLITS.values() for name in names} else place
        keys = f", or set data.images={place} data.labels={place} data.label_suffix={end}" if end else ""
        return DataError(
            f"{key}={root}: {folder / label} looks like the label of {folder / picture}, and would be taken as a "
            f"picture; move the labels into a folder labels beside images{keys}"
        )
    inner = [_relative(folder / places[side], root) for side in (1 - labels, labels)]
    return DataError(
        f"{key}={root}: the files of {inner[1]} look like the labels of those in {inner[0]} and would be taken as "
        f"pictures; set data.images={without_split(inner[0])} and data.labels={without_split(inner[1])}, or take the "
        "labels away"
    )


def _suffix(picture: str, label: str) -> str:
    """What the name of a label has behind that of its picture; empty where they differ otherwise."""
    stems = [unicodedata.normalize("NFC", os.path.splitext(name)[0]) for name in (picture, label)]
    end = stems[1].removeprefix(stems[0])
    return "" if end == stems[1] else end


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _splits(pair: tuple[str, str]) -> bool:
    """True for the folders of training and of validation."""
    last = [place.rsplit("/", 1)[-1].lower() for place in pair]
    kinds = [split for name in last for split, names in SPLITS.items() if name in names]
    return len(kinds) == 2 and kinds[0] != kinds[1]


def _twins(pictures: list[str]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """{(folder, folder): [(file, file), …]} of files of one stem whose paths differ in one folder, or in none.

    Files at different depths are twins of the folders at the top.
    """
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in pictures:
        by_stem[_bare(os.path.basename(name))].append(name)
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for names in by_stem.values():
        for one, other in combinations(names[:FLAT], 2):
            places = _places(one, other)
            if places is not None:
                found[places].append((one, other))
    return found


def _places(one: str, other: str) -> tuple[str, str] | None:
    """The folders in which two files of one stem differ; None where they differ in several."""
    parts = [name.split("/")[:-1] for name in (one, other)]
    if len(parts[0]) != len(parts[1]):
        tops = tuple(part[0] if part else "" for part in parts)
        return tops if tops[0] != tops[1] else None
    differing = [level for level, (a, b) in enumerate(zip(*parts, strict=True)) if a != b]
    if not differing:
        return "/".join(parts[0]), "/".join(parts[1])
    if len(differing) > 1:
        return None
    end = differing[0] + 1
    return "/".join(parts[0][:end]), "/".join(parts[1][:end])


def _bare(name: str) -> str:
    """The stem of a file without what programs append."""
    stem = os.path.splitext(name)[0]
    stem = stem if stem.isascii() else unicodedata.normalize("NFC", stem)
    while True:
        cut = max(stem.rfind(separator) for separator in SEPARATORS)
        if cut < 1 or stem[cut + 1 :].lower() not in SUFFIXES:
            return stem
        stem = stem[:cut]


def _counts(pictures: list[str]) -> Counter[str]:
    """{folder: files below it}, "" for all of them."""
    found: Counter[str] = Counter()
    for folder, count in Counter(os.path.dirname(name) for name in pictures).items():
        parts = folder.split("/") if folder else []
        for end in range(len(parts) + 1):
            found["/".join(parts[:end])] += count
    return found


def _flat(path: Path) -> bool:
    """True for a file that holds few values, as labels do; False for one that cannot be read."""
    try:
        with opened(path) as image:
            image.load()
            pixels, blurred = np.asarray(image), image.format in ("JPEG", "WEBP")
    except MemoryError:
        raise
    except Exception:  # named when it is read as a picture
        return False
    rows, columns = (max(1, side // SIDE) for side in pixels.shape[:2])
    pixels = pixels[::rows, ::columns].astype(np.int64) >> 3 * blurred
    if pixels.ndim == 3:
        pixels = sum(pixels[..., channel] << 16 * channel for channel in range(min(3, pixels.shape[2])))
    counts = np.sort(np.unique(pixels, return_counts=True)[1])[::-1]
    return len(counts) <= FLAT or counts[:FEW].sum() >= COVERED * counts.sum()
