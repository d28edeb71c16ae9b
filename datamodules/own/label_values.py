"""`data.label_values`: from the values that stand in people's label files to class ids, and the lines about values.

Masks are often saved as 0 and 255, ids as 1, 2, 3 or 10, 20, 30. Such a set names its values:
`data.label_values={0: 0, 255: 1}`. Every value that a label holds must be named then; 255 on the right is ignored.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ConfigError, DataError
from common.spec import IGNORE

KEY = "data.label_values"
SHOWN = 12
"""Values that a line lists."""


class LabelValues:
    """{value in a file: class id, or 255}; without a mapping values are class ids already.

    given: `data.label_values`, with keys as numbers or as texts. Raises ConfigError.
    """

    def __init__(self, given: Any, names: tuple[str, ...]) -> None:
        self.classes = len(names)
        self.table = parse(given)
        for value, target in self.table.items():
            if names and target != IGNORE and not 0 <= target < self.classes:
                raise ConfigError(
                    f"{KEY}={text(self.table)}: {value} becomes class {target}, but classes.json names {self.classes}; "
                    f"a class id must be 0..{self.classes - 1}, or 255 for pixels to ignore"
                )
        self._values = np.array(sorted(self.table), dtype=np.int64)
        self._targets = np.array([self.table[value] for value in sorted(self.table)], dtype=np.uint8)

    def __call__(self, label: np.ndarray, path: str | Path) -> np.ndarray:
        """Class ids uint8 [H,W] of the values of a file. Raises DataError for a value that is none of them."""
        if not self.table:
            wrong = (label < 0) | ((label >= self.classes) & (label != IGNORE))
            if wrong.any():
                raise self.refusal(path, int(label[wrong][0]))
            return label.astype(np.uint8, copy=False)
        place = np.searchsorted(self._values, label).clip(max=len(self._values) - 1)
        wrong = self._values[place] != label
        if wrong.any():
            raise self.refusal(path, int(label[wrong][0]))
        return self._targets[place]

    def known(self, value: int) -> bool:
        """Whether a label may hold this value."""
        return value in self.table if self.table else value == IGNORE or 0 <= value < self.classes

    def class_of(self, value: int) -> int:
        """The class id of a known value, or 255."""
        return self.table.get(value, value)

    def refusal(self, path: str | Path, value: int, seen: Iterable[int] = ()) -> DataError:
        """The error about a value that is not known. `seen`: all values that labels hold, where they are known."""
        if self.table:
            return DataError(
                f"{path}: the label holds the value {value}, which {KEY}={text(self.table)} does not name; add it "
                f"there, {value}: 255 to ignore such pixels"
            )
        mapping = suggestion(seen, self.classes)
        example = mapping or {0: 0, value: min(1, self.classes - 1)}
        held = f" (all labels looked at: {listed(seen)})" if seen else ""
        return DataError(
            f"{path}: the label holds the value {value}{held}, but with {self.classes} names in classes.json a value "
            f"must be 0..{self.classes - 1}, or 255 for pixels to ignore; name the values in {KEY}, "
            f"{'as' if mapping else 'such as'} {KEY}='{text(example)}', or mend the labels or classes.json"
        )

    def facts(self) -> str:
        """Names the mapping, for fingerprints; empty without one."""
        return text(self.table) if self.table else ""


def parse(given: Any) -> dict[int, int]:
    """A checked mapping; empty for none. Raises ConfigError."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{KEY}={given}: expected values and their class ids, as in {KEY}='{{0: 0, 255: 1}}'")
    found = {}
    for value, target in given.items():
        numbers = [whole(item) for item in (value, target)]
        if None in numbers or not -(2**31) <= numbers[0] < 2**32 or not 0 <= numbers[1] <= IGNORE:
            raise ConfigError(
                f"{KEY}: {value}: {target} is no whole number and its class id (0 or more, 255 for pixels to ignore), "
                "as in {0: 0, 255: 1}"
            )
        found[numbers[0]] = numbers[1]
    return found


def whole(item: Any) -> int | None:
    """A whole number, also one written as a text; None for anything else."""
    if isinstance(item, bool):
        return None
    try:
        return int(item) if isinstance(item, int | str) else None
    except ValueError:
        return None


def suggestion(seen: Iterable[int], classes: int) -> dict[int, int]:
    """A mapping of the values that were seen, in their order; empty where there is no telling.

    As many values as classes (255 among them or not): each is a class. Ids that begin at 1 leave 0 for no class.
    """
    values = sorted(set(seen))
    void = [IGNORE] if IGNORE in values else []
    inner = [value for value in values if value != IGNORE]
    if inner == list(range(classes + 1)):
        inner, void = inner[1:], [0, *void]
    if len(inner) != classes:
        inner, void = values, []
    return dict(zip(inner, range(classes), strict=True)) | dict.fromkeys(void, IGNORE) if len(inner) == classes else {}


def text(mapping: Mapping[int, int]) -> str:
    """A mapping as it is written on a command line."""
    return "{" + ", ".join(f"{value}: {target}" for value, target in mapping.items()) + "}"


def listed(values: Iterable[int]) -> str:
    """The first of some values, in order."""
    values = sorted(set(values))
    return ", ".join(map(str, values[:SHOWN])) + (", …" if len(values) > SHOWN else "")
