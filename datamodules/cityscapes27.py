"""Cityscapes in the 27 classes of this field (label ids 7..33; void ids 0..6 ignored), or in its usual 19.

Fine train (2,975) and val (500); five crops of each picture in training. `data.split=picie` is PiCIE's own: trained on
the pictures of test and train_extra, which have no fine labels, evaluated on val and train together.
"""

from common.spec import ClassMeta
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry
from datamodules.base.official import Facts, OfficialDataModule, Part

FIRST = 7
"""The first label id that is no void."""
CLASSES = (
    ("road", (128, 64, 128)), ("sidewalk", (244, 35, 232)), ("parking", (250, 170, 160)),
    ("rail track", (230, 150, 140)), ("building", (70, 70, 70)), ("wall", (102, 102, 156)), ("fence", (190, 153, 153)),
    ("guard rail", (180, 165, 180)), ("bridge", (150, 100, 100)), ("tunnel", (150, 120, 90)), ("pole", (153, 153, 153)),
    ("polegroup", (153, 153, 153)), ("traffic light", (250, 170, 30)), ("traffic sign", (220, 220, 0)),
    ("vegetation", (107, 142, 35)), ("terrain", (152, 251, 152)), ("sky", (70, 130, 180)), ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)), ("car", (0, 0, 142)), ("truck", (0, 0, 70)), ("bus", (0, 60, 100)),
    ("caravan", (0, 0, 90)), ("trailer", (0, 0, 110)), ("train", (0, 80, 100)), ("motorcycle", (0, 0, 230)),
    ("bicycle", (119, 11, 32)),
)  # fmt: skip
"""Names and official colours of the label ids 7..33."""
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Label ids of the 19 classes of the benchmark, in the order of its train ids."""
COUNTS = {"train": 2975, "val": 500}
UNLABELLED = {
    "test": (1525, "leftImg8bit_trainvaltest.zip"),
    "train_extra": (None, "leftImg8bit_trainextra.zip"),
}
"""Of PiCIE's split: pictures, and the download that brings them; the copies of train_extra differ by a broken one."""


class Cityscapes27DataModule(OfficialDataModule):
    """`data=cityscapes27 data.classes=27|19`."""

    variants = (27, 19)
    folders = ("cityscapes",)
    facts = Facts(
        title="Cityscapes, fine annotations",
        home="https://www.cityscapes-dataset.com (registration)",
        terms="the Cityscapes licence: free for research and teaching, non-commercial, no redistribution",
        downloads=(
            "leftImg8bit_trainvaltest.zip: pictures, into leftImg8bit/train and leftImg8bit/val",
            "gtFine_trainvaltest.zip: labels, into gtFine/train and gtFine/val (the *_labelIds.png are read)",
        ),
    )

    def parts(self) -> dict[str, Part]:
        found = {}
        for split, count in COUNTS.items():
            found[f"{split}.images"] = Part(
                f"pictures of {split}", (f"leftImg8bit/{split}",), ("_leftimg8bit.png",), count,
                "leftImg8bit_trainvaltest.zip", deep=True,
            )  # fmt: skip
            found[f"{split}.labels"] = Part(
                f"labels of {split}", (f"gtFine/{split}",), ("_gtfine_labelids.png",), count,
                "gtFine_trainvaltest.zip", deep=True,
            )  # fmt: skip
        for split, (count, fetch) in UNLABELLED.items() if self.of_picie else ():
            place = (f"leftImg8bit/{split}",)
            found[f"{split}.images"] = Part(
                f"pictures of {split}", place, ("_leftimg8bit.png",), count, fetch, deep=True
            )
        return found

    @property
    def of_picie(self) -> bool:
        return self.data.split == "picie"

    def entries(self, split: str) -> list[Entry]:
        if not self.of_picie:
            return super().entries(split)
        if split == "train":
            return [entry for part in UNLABELLED for entry in self.paired(f"{part}.images", None)]
        return [entry for part in ("val", "train") for entry in super(Cityscapes27DataModule, self).entries(part)]

    def official_count(self, split: str) -> int | None:
        if not self.of_picie:
            return COUNTS[split]
        return None if split == "train" else sum(COUNTS.values())

    def label_map(self) -> LabelMap:
        return label_map(self.data.classes)

    def build_meta(self) -> ClassMeta:
        return meta(self.data.classes)


def label_map(classes: int) -> LabelMap:
    """Label ids 0..33 -> 27 or 19 classes. 255 is the licence plate, id -1, where a file holds it."""
    ids = TRAIN_IDS if classes == 19 else tuple(range(FIRST, FIRST + len(CLASSES)))
    table = {value: place for place, value in enumerate(ids)}
    return LabelMap(table, ignored=[255, *(value for value in range(34) if value not in table)])


def meta(classes: int) -> ClassMeta:
    """Names and colours of the 27 or 19 classes."""
    chosen = CLASSES if classes == 27 else [CLASSES[value - FIRST] for value in TRAIN_IDS]
    return ClassMeta(tuple(name for name, _ in chosen), tuple(colour for _, colour in chosen))
