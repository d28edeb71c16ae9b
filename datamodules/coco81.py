"""COCO in 81 classes: background and the 80 things. Not comparable with COCO-Stuff-27.

Labels are the stuffthingmaps, as TransFGU read them: things 1..80, all stuff is background, unlabelled is ignored.
COMUS painted the instance annotations instead, where what nobody labelled is background
(`data.unlabelled=background` comes nearest; overlaps of instances may still differ).
"""

from dataclasses import replace

from common.errors import one_of
from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base.coco_files import FINE_NAMES, CocoDataModule, used_fine
from datamodules.base.label_map import LabelMap

THINGS = 91
"""Fine ids below this are things."""
GREY = (96, 96, 96)


class Coco81DataModule(CocoDataModule):
    """`data=coco81`."""

    facts = replace(CocoDataModule.facts, title="COCO 2017 in 81 classes, read from the pixel labels of COCO-Stuff")

    def label_map(self) -> LabelMap:
        one_of("data.unlabelled", self.data.unlabelled, ("ignore", "background"))
        things = [fine for fine in used_fine() if fine < THINGS]
        table = {fine: place + 1 for place, fine in enumerate(things)}
        table |= {fine: 0 for fine in used_fine() if fine >= THINGS}
        if self.data.unlabelled == "background":
            table[255] = 0
        return LabelMap(table)

    def build_meta(self) -> ClassMeta:
        names = ("background", *(FINE_NAMES[fine] for fine in used_fine() if fine < THINGS))
        return ClassMeta(names, (GREY, *default_palette(len(names) - 1)))
