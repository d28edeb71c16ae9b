"""From the label values of a data set's files to class ids, and the account of values that no table knows.

The releases start such a map from zeros, so that every value they forgot becomes class 0. Here it becomes 255, which no
score counts, and is counted itself.
"""

import logging
from collections.abc import Iterable, Mapping

import numpy as np
import torch.distributed as dist

from common import distributed
from common.spec import IGNORE

log = logging.getLogger(__name__)

Foreign = dict[str, dict[int, int]]
"""{label file: {value: pixels}} of values outside the table."""


class LabelMap:
    """{value: class id} as a table. `ignored`: values that are known and belong to no class (void)."""

    def __init__(self, table: Mapping[int, int], ignored: Iterable[int] = (IGNORE,)) -> None:
        self.table = np.full(257, IGNORE, dtype=np.uint8)
        self.known = np.zeros(257, dtype=bool)
        for value in ignored:
            self.known[value] = True
        for value, class_id in table.items():
            self.table[value] = class_id
            self.known[value] = True

    def __call__(self, label: np.ndarray) -> tuple[np.ndarray, dict[int, int]]:
        """Label of any whole-number type [H,W] -> class ids uint8 [H,W], and {value: pixels} of foreign values."""
        place = label if label.dtype == np.uint8 else np.where((label < 0) | (label > 255), 256, label)
        foreign = ~self.known[place]
        found = {}
        if foreign.any():
            values, counts = np.unique(label[foreign], return_counts=True)
            found = dict(zip(values.tolist(), counts.tolist(), strict=True))
        return self.table[place], found


class ForeignIds:
    """The foreign values of one split, as far as this process has seen them. Each new value is logged once."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.files: Foreign = {}

    def add(self, found: Mapping[str, Mapping[int, int]], told: bool = False) -> None:
        """Takes {file: {value: pixels}}; a file known already counts once. `told`: another process has logged it."""
        for file, values in found.items():
            if file in self.files:
                continue
            before = self.pixels
            self.files[file] = dict(values)
            for value in [] if told else [value for value in values if value not in before]:
                log.warning(
                    "%s: %d pixels have the value %d, which is in no table of this data set; they are ignored, and so "
                    "is this value wherever else it occurs in '%s'",
                    file, values[value], value, self.split,
                )  # fmt: skip

    def sync(self) -> None:
        """The values of all ranks together, on every rank (a collective)."""
        if distributed.active():
            parts: list[Foreign] = [{} for _ in range(distributed.world_size())]
            dist.all_gather_object(parts, self.files)
            self.add({file: values for part in parts for file, values in part.items()}, told=True)

    @property
    def pixels(self) -> dict[int, int]:
        """{value: pixels} over all files seen."""
        total: dict[int, int] = {}
        for values in self.files.values():
            for value, count in values.items():
                total[value] = total.get(value, 0) + count
        return dict(sorted(total.items()))
