"""A look at the labels of a folder before anything is trained: what they hold, and what no score would show.

The first labels in a keyed order are read, the same ones every time, until every class was seen and never more than
`LOOKED_AT` or `PIXELS` of a split; palettes and orientation tags stand at the beginning of a file and are read of more.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from common import chance
from common.errors import DataError
from common.spec import IGNORE
from datamodules.base.listed import Entry
from datamodules.files.reading import UnreadableError, read_label, turned
from datamodules.own import label_values, palettes
from datamodules.own.label_values import KEY, LabelValues
from datamodules.own.pairing import NAMED

log = logging.getLogger(__name__)

LOOKED_AT, FEWEST = 200, 8
"""Labels of a split that are read at most, and at least."""
PIXELS = 200_000_000
"""Pixels after which no further label is read."""
HEADERS = 1000
"""Files whose first bytes are read."""


@dataclass
class Seen:
    """What the labels of a split hold: {value: pixels}, of `looked` of `total` labels."""

    split: str
    total: int
    looked: int = 0
    pixels: dict[int, int] = field(default_factory=dict)
    wrong: tuple[str, int] | None = None
    """A file and a value of it that is not known."""

    def classes(self, values: LabelValues) -> set[int]:
        """Ids of the classes that were met."""
        return {found for value in self.pixels if values.known(value) and (found := values.class_of(value)) != IGNORE}


def examine(entries: dict[str, list[Entry]], names: tuple[str, ...], values: LabelValues) -> None:
    """Look at the labels of {split: pictures}, and say what is amiss, a line for each.

    Raises DataError for values that are no class, and where all that is known to be no 255 is one class: masks of 0
    and 255, whose objects would be ignored.
    """
    if not names:
        return
    looks = [look(split, part, values) for split, part in entries.items()]
    together = sorted({value for seen in looks for value in seen.pixels})
    for seen in looks:
        if seen.wrong is not None:
            raise values.refusal(*seen.wrong, together)
    inner = [value for value in together if value != IGNORE]
    if not values.table and IGNORE in together and len(inner) == 1:
        raise _two_values(entries, names, inner[0])
    if rank_zero_only.rank != 0:
        return
    for seen in looks:
        say_missing(seen, names, values)
    labelled = in_order([entry for part in entries.values() for entry in part if entry.label])[:HEADERS]
    palettes.say([entry.label for entry in labelled])
    say_turned([entry.picture for entry in labelled])


def look(split: str, entries: list[Entry], values: LabelValues) -> Seen:
    """Count the values of the labels of a split. A file that cannot be read is left to the reader. Raises DataError."""
    labelled = in_order([entry for entry in entries if entry.label])
    seen, pixels = Seen(split, len(labelled)), 0
    for path in [entry.label for entry in labelled[:LOOKED_AT]]:
        done = len(seen.classes(values)) == values.classes and seen.wrong is None
        if (done and seen.looked >= FEWEST) or pixels > PIXELS:
            break
        try:
            label = read_label(path)
        except UnreadableError:
            continue
        seen.looked += 1
        pixels += label.size
        for value, count in counted(label):
            seen.pixels[value] = seen.pixels.get(value, 0) + count
            if seen.wrong is None and not values.known(value):
                seen.wrong = path, value
    return seen


def say_missing(seen: Seen, names: tuple[str, ...], values: LabelValues) -> None:
    """Name the classes that no label of a split has a pixel of."""
    if not seen.total:
        log.warning("no picture of '%s' has a label%s", seen.split, UNSCORED if seen.split == "val" else "")
        return
    met = seen.classes(values)
    missing = [name for place, name in enumerate(names) if place not in met]
    those = (
        f"the {seen.total} labels" if seen.looked == seen.total else f"{seen.looked} of {seen.total} labels looked at"
    )
    if not met and seen.looked:
        log.warning(
            "'%s': every pixel of %s is ignored (255)%s",
            seen.split, those, UNSCORED if seen.split == "val" else "",
        )  # fmt: skip
    elif missing and seen.looked:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        log.warning(
            "'%s': no labelled pixel of class %s%s in %s, which hold the values %s; if values mean other classes, "
            "see %s",
            seen.split, ", ".join(missing[:NAMED]), more, those, label_values.listed(seen.pixels), KEY,
        )  # fmt: skip
    if len(met) == 1 and seen.split == "val":
        only = names[next(iter(met))]
        log.warning("'val': all labelled pixels are of one class, %s: no accuracy or mIoU can be given", only)


UNSCORED = ": nothing can be scored, and the last step counts as the best"


def say_turned(pictures: list[str]) -> None:
    """Name labelled pictures that a tag turns, once, with the rule."""
    found = [path for path in pictures if turned(path)]
    if found:
        log.warning(
            "%s: this picture and %d more of %d labelled ones looked at are turned by an orientation tag, as viewers "
            "show them; their labels must show the turned picture, or be scored wrongly",
            found[0], len(found) - 1, len(pictures),
        )  # fmt: skip


def counted(label: np.ndarray) -> list[tuple[int, int]]:
    """(value, pixels) of a label."""
    if label.dtype == np.uint8:
        counts = np.bincount(label.ravel(), minlength=256)
        return [(value, int(counts[value])) for value in np.flatnonzero(counts).tolist()]
    return list(zip(*(part.tolist() for part in np.unique(label, return_counts=True)), strict=True))


def in_order(entries: list[Entry]) -> list[Entry]:
    """In a keyed order, the same every time and wherever the folder lies: the first n are a fair choice."""
    return sorted(entries, key=lambda entry: chance.key(0, f"label_look/{entry.id}"))


def _two_values(entries: dict[str, list[Entry]], names: tuple[str, ...], value: int) -> DataError:
    """What to do about labels that hold one value and 255."""
    first = next(entry.label for part in entries.values() for entry in part if entry.label)
    both = "" if len(names) > 1 else f' and name both classes in classes.json, as ["background", "{names[0]}"]'
    return DataError(
        f"{first}: this label, as all that were looked at, holds nothing but {value} and 255, and 255 means pixels to "
        f"ignore; where it is a class here, set {KEY}='{label_values.text({value: 0, IGNORE: 1})}'{both}; where it is "
        f"not, say so: {KEY}='{label_values.text({value: min(value, len(names) - 1), IGNORE: IGNORE})}'"
    )
