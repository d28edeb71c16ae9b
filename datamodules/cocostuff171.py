"""COCO-Stuff in its own 171 classes: 80 things, then 91 stuff (TransFGU's table, damo-cv/TransFGU)."""

from dataclasses import replace

from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base.coco_files import FINE_NAMES, CocoDataModule, used_fine
from datamodules.base.label_map import LabelMap


class CocoStuff171DataModule(CocoDataModule):
    """`data=cocostuff171`: the fine ids without the eleven that COCO never used, numbered without gaps."""

    facts = replace(CocoDataModule.facts, title="COCO 2017 with the pixel labels of COCO-Stuff in its 171 classes")

    def label_map(self) -> LabelMap:
        return LabelMap({fine: place for place, fine in enumerate(used_fine())})

    def build_meta(self) -> ClassMeta:
        names = tuple(FINE_NAMES[fine] for fine in used_fine())
        return ClassMeta(names, default_palette(len(names)))
