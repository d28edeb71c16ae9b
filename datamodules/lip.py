"""Look Into Person (LIP), single persons: background and 5, 16 or 19 parts of a person.

Trained on train (30,462) and evaluated on val (10,000).
"""

from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base.label_map import LabelMap
from datamodules.base.official import Facts, OfficialDataModule, Part

PARTS = (
    "background", "hat", "hair", "glove", "sunglasses", "upper_clothes", "dress", "coat", "socks", "pants", "jumpsuits",
    "scarf", "skirt", "face", "left_arm", "right_arm", "left_leg", "right_leg", "left_shoe", "right_shoe",
)  # fmt: skip
"""By the value in the label files."""
COARSE = {
    "background": (0,), "head": (1, 2, 4, 13), "upper_body": (5, 6, 7, 10, 11, 12), "arms": (3, 14, 15),
    "legs": (9, 16, 17), "feet": (8, 18, 19),
}  # fmt: skip
"""The five parts, by the values that they are made of."""
SINGLE = {name: (value,) for value, name in enumerate(PARTS)}
SIDES = {name: SINGLE[name] for name in PARTS[:14]} | {"arm": (14, 15), "leg": (16, 17), "shoe": (18, 19)}
"""Sixteen parts: left and right are one."""
CLASSES = {5: COARSE, 16: SIDES, 19: SINGLE}
COUNTS = {"train": 30462, "val": 10000}
GREY = (96, 96, 96)


class LipDataModule(OfficialDataModule):
    """`data=lip data.classes=5|16|19`; the background comes on top."""

    variants = (5, 16, 19)
    folders = ("LIP", "lip")
    facts = Facts(
        title="Look Into Person (LIP), single persons",
        home="http://sysu-hcp.net/lip/",
        terms="non-commercial research only",
        downloads=(
            "TrainVal_images.zip: train_images/ and val_images/, into TrainVal_images",
            "TrainVal_parsing_annotations.zip: train_segmentations/ and val_segmentations/, into "
            "TrainVal_parsing_annotations",
        ),
        notes=("the multi-person set (CIHP) is another release and is not read",),
    )

    def parts(self) -> dict[str, Part]:
        pictures, labels, found = "TrainVal_images", "TrainVal_parsing_annotations", {}
        for split, count in COUNTS.items():
            for name, what, archive, inner, ending in (
                ("images", "pictures", pictures, f"{split}_images", (".jpg",)),
                ("labels", "labels", labels, f"{split}_segmentations", (".png",)),
            ):
                places = (f"{archive}/{inner}", f"{archive}/{archive}/{inner}", inner)
                found[f"{split}.{name}"] = Part(f"{what} of {split}", places, ending, count, f"{archive}.zip")
        return found

    def official_count(self, split: str) -> int:
        return COUNTS[split]

    def label_map(self) -> LabelMap:
        classes = CLASSES[self.data.classes].values()
        return LabelMap({value: number for number, values in enumerate(classes) for value in values})

    def build_meta(self) -> ClassMeta:
        names = tuple(CLASSES[self.data.classes])
        return ClassMeta(names, (GREY, *default_palette(len(names) - 1)))
