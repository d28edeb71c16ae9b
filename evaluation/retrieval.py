"""Read-out by retrieval: segments of a picture take the vote of the nearest labelled segments of training pictures.

It reads the labels of the training pictures, plainly: what it scores is how well segments of one class lie together,
not a clustering. Sources: SegSort (ICCV 2019) section 3.4; HSG (CVPR 2022).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from common.spec import ClassMeta
from evaluation import readout
from evaluation.metrics import SegmentationScore
from evaluation.readouts import LabelledReadout
from grouping.segments import at_cells, majority_labels, prototypes, segment_sizes, sort_pixels, sorting
from retrieval.voting import nearest_labels, vote


@dataclass
class SegmentBank:
    """Prototypes of labelled segments of training pictures."""

    vectors: Tensor
    """float32 [M,D], unit length."""
    labels: Tensor
    """int64 [M]"""


class SegmentRetrieval(LabelledReadout):
    """The keys `evaluation.retrieval.*` at work; ready as soon as it has a bank. `policy`: see `SegmentationScore`.

    Raises ConfigError for values it cannot run with.
    """

    name = "retrieval"

    def __init__(self, settings: Any, classes: int, **policy: Any) -> None:
        super().__init__()
        self.sorting = sorting(settings, "evaluation.retrieval")
        if settings.upsample < 1:
            raise ConfigError(f"evaluation.retrieval.upsample={settings.upsample}: must be at least 1")
        self.settings, self.classes = settings, classes
        self.bank: SegmentBank | None = None
        self.score = SegmentationScore(classes, classes, matching="identity", **policy)

    @property
    def ready(self) -> bool:
        return self.bank is not None

    def classes_of(self, batch: Mapping[str, Any], codes: Tensor) -> Tensor:
        return self.predict(codes, batch["valid"])

    def protocol(self) -> str:
        own = self.settings
        return (
            f"labels of training pictures, {own.k} nearest segments, grid {own.cells[0]}x{own.cells[1]}, "
            f"{own.pictures} pictures at most"
        )

    def segments(self, codes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, int, tuple[int, int]]:
        """Segments of pictures: unit vectors [B*N,D], ids [B*N] (-1: padding), how many, and the size of the map.

        codes [B,D,h,w], valid bool [B,H,W]. Spherical k-means inside every picture on codes that are `upsample` times
        as large.
        """
        codes = codes.detach().float()
        if self.settings.upsample > 1:
            codes = F.interpolate(codes, scale_factor=self.settings.upsample, mode="bilinear", align_corners=False)
        size = tuple(codes.shape[-2:])
        found = sort_pixels(codes, **self.sorting, valid=at_cells(valid, size))
        return found.unit.flatten(0, 1), found.ids.flatten(), int(found.counts.sum()), size

    def labelled(self, codes: Tensor, label: Tensor, valid: Tensor) -> SegmentBank:
        """The labelled segments of training pictures: codes [B,D,h,w], label [B,H,W] with 255 = ignore.

        A segment has the class of most of its cells; only those cells make its prototype. Segments without any label
        are left out.
        """
        unit, ids, count, size = self.segments(codes, valid)
        cells = at_cells(label, size).flatten()
        majority = majority_labels(cells, ids, count, self.classes)
        inside = (ids >= 0) & (cells == majority[ids.clamp(min=0)])
        ids = ids.where(inside, -1)
        kept = segment_sizes(ids, count) > 0
        return SegmentBank(prototypes(unit, ids, count)[kept], majority[kept])

    def predict(self, codes: Tensor, valid: Tensor) -> Tensor:
        """Classes [B,H,W] of pictures: of each segment the vote of its `k` nearest rows of the bank.

        Padding takes class 0, which no score counts.
        """
        unit, ids, count, size = self.segments(codes, valid)
        found = nearest_labels(prototypes(unit, ids, count), self.bank.vectors, self.bank.labels, self.settings.k)
        classes = vote(found, self.classes)
        maps = classes[ids.clamp(min=0)].where(ids >= 0, 0).view(len(codes), *size)
        return readout.upsample_ids(maps, tuple(valid.shape[-2:]))


def configured(rules: Any, meta: ClassMeta) -> list[SegmentRetrieval]:
    """The read-out of `evaluation.retrieval.*`, where it is asked for; `rules`: the keys `evaluation.*`.

    Raises ConfigError where the data has no labels.
    """
    own = rules.retrieval
    if not own.k:
        return []
    if not meta.has_labels:
        raise ConfigError(
            f"evaluation.retrieval.k={own.k}: this read-out votes by labels of training pictures and the data has "
            "none; set evaluation.retrieval.k=0"
        )
    return [
        SegmentRetrieval(own, meta.num_classes, extra=rules.extra, absent=rules.absent, background=rules.background)
    ]
