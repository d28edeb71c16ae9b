"""COCO-Stuff in coarse classes: 27 (12 things, 15 stuff), its 15 stuff classes, or three of them.

The field's main benchmark. As STEGO and HP: trained on the un-suffixed list (97,702 pictures, five crops of each),
evaluated on the 2,175 pictures of the "_7" list; 15 classes use the "_7" lists of both splits, 3 classes those of
"Few_Stuff_6".
"""

from dataclasses import replace

from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base.coco_files import COARSE_NAMES, FIRST_STUFF, LISTS, CocoDataModule, fine_to_coarse
from datamodules.base.label_map import LabelMap

THREE = {23: 0, 22: 1, 21: 2}
"""Coarse ids of sky, plant and ground in the order of the three classes."""
OWN_LISTS = {27: ("coarse", "curated7"), 15: ("curated7", "curated7"), 3: ("few6", "few6")}
"""Lists of training and evaluation that belong to a number of classes (`auto`)."""


class CocoStuff27DataModule(CocoDataModule):
    """`data=cocostuff27 data.classes=27|15|3`."""

    variants = (27, 15, 3)
    facts = replace(
        CocoDataModule.facts, title="COCO 2017 with the pixel labels of COCO-Stuff in 27 classes (or 15, or 3)"
    )

    def list_name(self, split: str) -> str:
        name = super().list_name(split)
        return OWN_LISTS[self.data.classes][split == "val"] if name == "auto" else name

    def _remedy(self, name: str) -> str:
        return super()._remedy(name).replace(", ".join(LISTS), f"auto, {', '.join(LISTS)}")

    def label_map(self) -> LabelMap:
        return coarse_map(self.data.classes)

    def build_meta(self) -> ClassMeta:
        if self.data.classes == 27:
            names = COARSE_NAMES
        elif self.data.classes == 15:
            names = COARSE_NAMES[FIRST_STUFF:]
        else:
            names = tuple(COARSE_NAMES[coarse] for coarse in THREE)
        return ClassMeta(names, default_palette(len(names)))


def coarse_map(classes: int) -> LabelMap:
    """Fine ids -> 27, 15 or 3 classes; fine ids of other classes are known and ignored."""
    coarse = fine_to_coarse()
    if classes == 27:
        table = coarse
    elif classes == 15:
        table = {fine: value - FIRST_STUFF for fine, value in coarse.items() if value >= FIRST_STUFF}
    else:
        table = {fine: THREE[value] for fine, value in coarse.items() if value in THREE}
    return LabelMap(table, ignored=[255, *(fine for fine in coarse if fine not in table)])
