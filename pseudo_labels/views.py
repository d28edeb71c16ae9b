"""From records to label maps: what training sees of a stage. Maps are functions of records and tables alone.

Every map has 0 = background, 1..K = clusters and 255 = no label (`IGNORE`), at the size of the picture's file. Tables
count clusters from 0; only here they are shifted by one, so no cluster falls together with the background. A picture
that a step has dropped has no label anywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np

from common.errors import one_of
from common.spec import IGNORE
from pseudo_labels.cache import Record, Records

OVERLAPS = ("skip", "free_pixels", "overwrite", "released")
"""Of a mask that lies on one that was painted before: it is left out, it takes the pixels that are free, or all.
`released` is what MaskDistill's code does in place of `skip`: a mask takes all its pixels, unless something is painted
in the map's first two rows (the first where the mask is empty, the second where it is the whole map)."""


class View(ABC):
    """Label maps of pictures by their index in the data set; given to `SegmentationDataModule.pseudo`."""

    def __init__(self, records: Records, fields: tuple[str, ...]) -> None:
        self.source, self.fields = records, fields

    @abstractmethod
    def labels(self, record: Record) -> np.ndarray:
        """The map of a kept record, int [h,w] at any size that covers what the grid covers."""

    def read(self, picture: int, size: tuple[int, int]) -> np.ndarray:
        """Pseudo-labels of a picture of `size` (height, width): int32 [H,W]."""
        record = self.source.read(picture, self.fields)
        if not record.keep:
            return np.full(size, IGNORE, np.int32)
        return enlarged(self.labels(record), size, record.extent).astype(np.int32)


class Segments(View):
    """`segments`, each region with its cluster.

    assignment: int [R] cluster of every row of `names` over all kept pictures, in order (`Records.rows("names")`), -1:
    none, its pixels are ignored; None: the segments' own ids. An id that no row names, and 0, is background; with
    `background=False` id 0 is a region like others and clusters are not shifted: ids 0..K-1.
    """

    def __init__(self, records: Records, assignment: np.ndarray | None, background: bool = True) -> None:
        super().__init__(records, ("segments", "names"))
        self.assignment, self.shift = None if assignment is None else np.asarray(assignment, np.int64), int(background)
        self.first = None if assignment is None else first_rows(records, "names")

    def labels(self, record: Record) -> np.ndarray:
        segments, names = record.fields["segments"].astype(np.int64), record.fields["names"].astype(np.int64)
        if self.assignment is None:
            return segments
        table = np.full(int(max(segments.max(), names.max(initial=0))) + 1, 0 if self.shift else IGNORE)
        start = self.first[record.index]
        clusters = self.assignment[start : start + len(names)]
        table[names] = np.where(clusters < 0, IGNORE, clusters + self.shift)
        return table[segments]


class Shades(View):
    """One eigenvector as 256 shades, for people: 0 at its smallest entry, 255 at its largest."""

    def __init__(self, records: Records, number: int) -> None:
        super().__init__(records, ("eigenvectors",))
        self.number = number

    def labels(self, record: Record) -> np.ndarray:
        return shades(record.fields["eigenvectors"][self.number])


class Painted(View):
    """`masks` painted in the order of falling `scores` (of equals the first first), each with its class + 1.

    classes: where given, the class of every mask over all kept pictures in order, -1: not painted; else the records'
    own field `classes`. overlap: see OVERLAPS. `skip` is what MaskDistill (Van Gansbeke et al., 2022) means.
    threshold: only masks that are `confident` are painted; None: all.
    """

    def __init__(
        self,
        records: Records,
        classes: np.ndarray | None = None,
        overlap: str = "skip",
        threshold: float | None = None,
    ) -> None:
        one_of("overlap", overlap, OVERLAPS)
        super().__init__(records, ("masks", "scores", "classes"))
        self.classes, self.overlap, self.threshold = classes, overlap, threshold
        self.first = None if classes is None else first_rows(records, "masks")

    def labels(self, record: Record) -> np.ndarray:
        masks = record.fields["masks"]
        scores = record.fields.get("scores", np.zeros(len(masks), np.float32))
        if self.classes is None:
            classes = record.fields["classes"]
        else:
            classes = self.classes[self.first[record.index] :][: len(masks)]
        order = np.argsort(-scores, kind="stable") if self.threshold is None else confident(scores, self.threshold)
        return paint(masks[order], np.asarray(classes)[order], self.overlap)


class Certain(Painted):
    """As `Painted` with a table of classes, but a mask of class -1 may be anything: its pixels have no label where no
    other mask took them, and a picture without any other has none at all."""

    def labels(self, record: Record) -> np.ndarray:
        masks = record.fields["masks"]
        classes = self.classes[self.first[record.index] :][: len(masks)]
        if not (classes >= 0).any():
            return np.full(masks.shape[1:], IGNORE)
        found = super().labels(record)
        return np.where((found == 0) & masks[classes < 0].any(0), IGNORE, found)


class Saliency(View):
    """The first mask of a picture, its pixels with the picture's cluster + 1; -1 or no entry: the picture is ignored.

    clusters: picture's index -> cluster; None: one class, object or not.
    """

    def __init__(self, records: Records, clusters: Mapping[int, int] | None = None) -> None:
        super().__init__(records, ("masks",))
        self.clusters = clusters

    def labels(self, record: Record) -> np.ndarray:
        mask = record.fields["masks"][0]
        cluster = 0 if self.clusters is None else self.clusters.get(record.index, -1)
        return np.full(mask.shape, IGNORE) if cluster < 0 else np.where(mask, cluster + 1, 0)


class Soft(View):
    """The class of the largest entry of `class_map` [K,h,w], of equals the first.

    background: places whose largest entry is at most this are background and classes are shifted by one; None: there is
    none, ids are 0..K-1. The maps themselves are read with `Records.read(index, ["class_map"])`.
    """

    def __init__(self, records: Records, background: float | None = None) -> None:
        super().__init__(records, ("class_map",))
        self.background = background

    def labels(self, record: Record) -> np.ndarray:
        maps = record.fields["class_map"]
        best = maps.argmax(0)
        return best if self.background is None else np.where(maps.max(0) <= self.background, 0, best + 1)


class Strongest(View):
    """One of the concept maps of a picture for people, as 256 shades: 0 at its smallest entry, 255 at its largest.

    rank: 0 is the concept that is the largest at most places, as in `Soft`, 1 the next, and so on; of equals the one
    with the larger sum over the picture comes first.
    """

    def __init__(self, records: Records, rank: int) -> None:
        super().__init__(records, ("class_map",))
        self.rank = rank

    def concept(self, record: Record) -> int:
        """Which concept it is of this picture."""
        maps = record.fields["class_map"].astype(np.float64)
        places = np.bincount(maps.argmax(0).ravel(), minlength=len(maps))
        return int(np.lexsort((-maps.sum((1, 2)), -places))[min(self.rank, len(maps) - 1)])

    def labels(self, record: Record) -> np.ndarray:
        return shades(record.fields["class_map"][self.concept(record)])


def confident(scores: np.ndarray, threshold: float) -> np.ndarray:
    """Which of the masks of a picture with these scores [n] are to be believed, the surest first: int64 [m].

    All from the threshold on; where there is none, the surest alone. Of equal scores the first comes first.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    sure = order[np.asarray(scores)[order] >= threshold]
    return sure if len(sure) else order[:1]


def paint(masks: np.ndarray, classes: np.ndarray, overlap: str) -> np.ndarray:
    """Masks bool [n,h,w] on one map, in their order, each with its class + 1; class -1 is left out: int64 [h,w]."""
    result = np.zeros(masks.shape[1:], np.int64)
    for mask, name in zip(masks, classes, strict=True):
        free = mask & (result == 0)
        if overlap == "released":
            looked_at = [row for row, there in ((0, ~mask), (1, mask)) if there.any() and row < len(result)]
            skip = bool(result[looked_at].any())
        else:
            skip = overlap == "skip" and free.sum() < mask.sum()
        if name >= 0 and not skip:
            result[mask if overlap in ("overwrite", "released") else free] = name + 1
    return result


def shades(values: np.ndarray) -> np.ndarray:
    """Values [h,w] as whole numbers from 0, the smallest, to 255, the largest."""
    values = values.astype(np.float64)
    spread = values.max() - values.min()
    return np.round(255 * (values - values.min()) / (spread if spread > 0 else 1)).astype(np.int64)


def first_rows(records: Records, name: str) -> np.ndarray:
    """Where the rows of every picture begin among those of all kept ones (`Records.rows(name)`): int64 [pictures]."""
    counts = records.counts(name)
    return counts.cumsum() - counts


def enlarged(ids: np.ndarray, size: tuple[int, int], extent: tuple[float, float] = (1.0, 1.0)) -> np.ndarray:
    """A map [h,w] that covers `extent` of a picture, at the picture's size: nearest; [H,W].

    What the map does not reach at the bottom and right takes its last row and column.
    """
    places = []
    for cells, pixels, share in zip(ids.shape, size, extent, strict=True):
        position = (np.arange(pixels) + 0.5) / pixels / share * cells
        places.append(np.minimum(position.astype(np.int64), cells - 1))
    return ids[np.ix_(*places)]
