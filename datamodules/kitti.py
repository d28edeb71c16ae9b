"""KITTI in the 19 classes of Cityscapes: KITTI-STEP (video frames, 5,027 and 2,981) or the 200 pictures of 2015.

HSG reports on KITTI-STEP; its lists were not released, so the published sequences of train and val are taken. The
pictures of 2015 have no published validation split: every fifth is evaluated here.
"""

from common.errors import one_of
from common.spec import ClassMeta
from datamodules import cityscapes27
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry, ListedSource
from datamodules.base.official import Facts, OfficialDataModule, Part
from datamodules.files.reading import read_first_channel

VAL_SEQUENCES = ("0002", "0006", "0007", "0008", "0010", "0013", "0014", "0016", "0018")
"""Of the 21 tracking sequences; the other twelve are for training."""
STEP_COUNTS = {"train": 5027, "val": 2981}
EVERY = 5
"""One picture of so many is evaluated, of those of 2015."""


class PanopticSource(ListedSource):
    """Labels are panoptic maps."""

    def __init__(self, entries: list[Entry], labels: LabelMap) -> None:
        super().__init__(entries, labels, read_label=read_first_channel)


class KittiDataModule(OfficialDataModule):
    """`data=kitti data.release=step|semantics`."""

    folders = ("kitti-step", "kitti_step", "data_semantics")
    facts = Facts(
        title="KITTI-STEP, or the KITTI semantic segmentation benchmark of 2015",
        home="https://www.cvlibs.net/datasets/kitti (registration)",
        terms="CC BY-NC-SA 3.0",
        downloads=(
            "release=step: data_tracking_image_2.zip: frames, into training/image_02 (or images/train and images/val)",
            "release=step: the panoptic maps of KITTI-STEP, into panoptic_maps/train and panoptic_maps/val",
            "release=semantics: data_semantics.zip: pictures and labels, into training/image_2 and training/semantic",
        ),
    )

    @property
    def step(self) -> bool:
        one_of("data.release", self.data.release, ("step", "semantics"))
        return self.data.release == "step"

    def parts(self) -> dict[str, Part]:
        if not self.step:
            return {
                "images": Part("pictures", ("training/image_2",), (".png",), 200, "data_semantics.zip"),
                "labels": Part("labels", ("training/semantic",), (".png",), 200, "data_semantics.zip"),
            }
        found = {}
        for split, count in STEP_COUNTS.items():
            found[f"{split}.images"] = Part(
                f"frames of {split}", ("training/image_02", f"images/{split}"), (".png", ".jpg"), None,
                "data_tracking_image_2.zip", deep=True,
            )  # fmt: skip
            found[f"{split}.labels"] = Part(
                f"panoptic maps of {split}", (f"panoptic_maps/{split}",), (".png",), count,
                "the panoptic maps of KITTI-STEP", deep=True,
            )  # fmt: skip
        return found

    def entries(self, split: str) -> list[Entry]:
        if not self.step:
            found = self.paired("images", "labels")
            return [entry for place, entry in enumerate(found) if (place % EVERY == EVERY - 1) == (split == "val")]
        found = self.paired(f"{split}.images", f"{split}.labels")
        return [entry for entry in found if (entry.id.split("/")[0] in VAL_SEQUENCES) == (split == "val")]

    def official_count(self, split: str) -> int | None:
        return STEP_COUNTS[split] if self.step else None

    def describe(self, split: str) -> str:
        return f"{super().describe(split)} of {self.data.release}"

    def make_source(self, entries: list[Entry]) -> ListedSource:
        return PanopticSource(entries, self.label_map()) if self.step else super().make_source(entries)

    def label_map(self) -> LabelMap:
        """KITTI-STEP holds the 19 train ids, the pictures of 2015 hold label ids of Cityscapes."""
        return LabelMap({value: value for value in range(19)}) if self.step else cityscapes27.label_map(19)

    def build_meta(self) -> ClassMeta:
        return cityscapes27.meta(19)
