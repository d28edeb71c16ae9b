"""COCO 2017 with the label pictures of COCO-Stuff: layout, ids, the tables of three data sets, and the id lists.

A "fine" id is a value of the stuffthingmaps pngs: COCO category id - 1, so 0..90 are things and 91..181 stuff; 255 is
unlabelled. Source: nightrome/cocostuff.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from common.errors import DataError
from common.files import write_text
from datamodules.base.listed import Entry
from datamodules.base.official import Check, Facts, OfficialDataModule, Part
from datamodules.files.reading import read_label

PUBLISHED = {"train2017": 118_287, "val2017": 5_000}
"""Pictures of the COCO 2017 archives."""
LISTS = {
    "coarse": "Coco164kFull_Stuff_Coarse",
    "curated7": "Coco164kFull_Stuff_Coarse_7",
    "few6": "Coco164kFew_Stuff_6",
}
"""File names of the lists, as IIC called them."""
COUNTS = {
    "coarse": {"train2017": 97_702, "val2017": 4_172},
    "curated7": {"train2017": 49_629, "val2017": 2_175},
    "few6": {"train2017": 35_228, "val2017": 1_432},
    "full": PUBLISHED,
}
CHECKSUMS = {
    ("curated7", "train2017"): "bf3d54a2d1d4f2b5f9ff6bb7de1eaa18",
    ("curated7", "val2017"): "de66cfb97c6ea796c3ba8e001edda199",
}
"""md5 of lists that are known to the byte."""
SMALLEST_SIDE, STUFF_SHARE = 360, 0.75
"""The rule of the "_7" lists: both sides of at least so many px, and at least this share of all pixels is stuff."""
FIRST_STUFF = 12
"""Coarse ids from here on are stuff."""

UNUSED_THINGS = (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)
"""Fine ids that COCO reserved and never used."""
THING_RANGES = (
    (0, 0, 9), (1, 8, 11), (9, 14, 8), (15, 24, 7), (25, 32, 6), (33, 42, 10), (43, 50, 5), (51, 60, 2), (61, 70, 3),
    (71, 76, 0), (77, 82, 1), (83, 90, 4),
)  # fmt: skip
"""First and last fine id, coarse id."""
STUFF_COARSE = (
    17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13, 13, 13, 13, 22, 26,
    14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16, 21, 17, 22, 16, 21, 21, 25, 21, 26, 21,
    24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22, 25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26,
    26, 19, 19, 24,
)  # fmt: skip
"""Coarse ids of the fine ids 91..181."""
COARSE_NAMES = (
    "electronic", "appliance", "food-thing", "furniture-thing", "indoor", "kitchen", "accessory", "animal", "outdoor",
    "person", "sports", "vehicle", "ceiling", "floor", "food-stuff", "furniture-stuff", "raw-material", "textile",
    "wall", "window", "building", "ground", "plant", "sky", "solid", "structural", "water",
)  # fmt: skip
"""Both kinds of food and of furniture are told apart by their endings."""
FINE_NAMES = tuple(
    """person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|street sign|stop sign
parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|hat|backpack|umbrella|shoe|eye glasses
handbag|tie|suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard
tennis racket|bottle|plate|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|hot dog
pizza|donut|cake|chair|couch|potted plant|bed|mirror|dining table|window|desk|toilet|door|tv|laptop|mouse|remote
keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|blender|book|clock|vase|scissors|teddy bear|hair drier
toothbrush|hair brush|banner|blanket|branch|bridge|building-other|bush|cabinet|cage|cardboard|carpet|ceiling-other
ceiling-tile|cloth|clothes|clouds|counter|cupboard|curtain|desk-stuff|dirt|door-stuff|fence|floor-marble|floor-other
floor-stone|floor-tile|floor-wood|flower|fog|food-other|fruit|furniture-other|grass|gravel|ground-other|hill|house
leaves|light|mat|metal|mirror-stuff|moss|mountain|mud|napkin|net|paper|pavement|pillow|plant-other|plastic|platform
playingfield|railing|railroad|river|road|rock|roof|rug|salad|sand|sea|shelf|sky-other|skyscraper|snow|solid-other
stairs|stone|straw|structural-other|table|tent|textile-other|towel|tree|vegetable|wall-brick|wall-concrete|wall-other
wall-panel|wall-stone|wall-tile|wall-wood|water-other|waterdrops|window-blind|window-other|wood""".replace(
        "\n", "|"
    ).split("|")
)
"""Names of the fine ids 0..181."""


def fine_to_coarse() -> dict[int, int]:
    """The 182 fine ids -> 27 coarse classes (the same in IIC, PiCIE, STEGO and HP)."""
    table = {fine: coarse for first, last, coarse in THING_RANGES for fine in range(first, last + 1)}
    return table | {91 + place: coarse for place, coarse in enumerate(STUFF_COARSE)}


def used_fine() -> list[int]:
    """The 171 fine ids that COCO uses, in order."""
    return [fine for fine in range(len(FINE_NAMES)) if fine not in UNUSED_THINGS]


def meets_rule(label: np.ndarray) -> bool:
    """True where a fine label [H,W] belongs into the "_7" lists."""
    if min(label.shape) < SMALLEST_SIDE:
        return False
    stuff = np.zeros(256, dtype=bool)
    stuff[[fine for fine, coarse in fine_to_coarse().items() if coarse >= FIRST_STUFF]] = True
    return int(stuff[np.minimum(label, 255)].sum()) >= label.size * STUFF_SHARE


def rule_list(labels: dict[str, str]) -> list[str]:
    """The ids of a "_7" list, out of all label files {id: path} of a split. Reads every one of them."""
    return [name for name, path in sorted(labels.items()) if meets_rule(read_label(path))]


def write_list(path: Path, ids: Iterable[str]) -> None:
    """One id a line, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{name}\n" for name in ids))


def read_list(path: Path) -> list[str]:
    """The ids of a list; one a line, empty lines left out, endings of files allowed."""
    return [line.strip().removesuffix(".jpg") for line in path.read_text().splitlines() if line.strip()]


class CocoDataModule(OfficialDataModule):
    """Pictures and fine labels of COCO 2017 by id lists. `data.train_list` and `data.eval_list` name them:
    coarse, curated7, few6, full (every picture that has a label), or a text file of ids.
    """

    folders = ("cocostuff",)
    facts = Facts(
        title="COCO 2017 with the pixel labels of COCO-Stuff",
        home="https://cocodataset.org and https://github.com/nightrome/cocostuff",
        terms="annotations CC BY 4.0; the pictures under Flickr's terms of use, rights with their photographers",
        downloads=(
            "train2017.zip and val2017.zip (COCO home page): pictures, into images/train2017 and images/val2017",
            "stuffthingmaps_trainval2017.zip (COCO-Stuff home page): labels, into annotations/train2017 and "
            "annotations/val2017",
            "curated/train2017/*.txt and curated/val2017/*.txt (folder `curated` of github.com/janghyuncho/PiCIE, "
            "MIT): the id lists that IIC made and everyone evaluates on",
        ),
        notes=("rebuild=true makes the _7 lists out of the label files by their rule (reads all of them)",),
    )

    def parts(self) -> dict[str, Part]:
        found = {}
        for split, count in PUBLISHED.items():
            found[f"{split}.images"] = Part(
                f"pictures of {split}", (f"images/{split}", split), (".jpg", ".jpeg"), count, f"{split}.zip of COCO"
            )
            found[f"{split}.labels"] = Part(
                f"labels of {split}",
                tuple(f"{folder}{split}" for folder in (
                    "annotations/", "stuffthingmaps_trainval2017/", "stuffthingmaps/", "",
                )),
                (".png",), count, "stuffthingmaps_trainval2017.zip of COCO-Stuff",
            )  # fmt: skip
        return found

    def list_name(self, split: str) -> str:
        """What `data.train_list` or `data.eval_list` says."""
        return str(self.data["train_list" if split == "train" else "eval_list"])

    def describe(self, split: str) -> str:
        return f"{super().describe(split)} of {self.list_name(split)}"

    def list_file(self, name: str, folder: str) -> Path:
        """Where the list `name` of train2017 or val2017 lies; a name that is no list is a file of its own."""
        if name not in LISTS:
            return Path(name).expanduser()
        return (
            (Path(self.data.lists).expanduser() if self.data.lists else self.base / "curated")
            / folder
            / (f"{LISTS[name]}.txt")
        )

    def entries(self, split: str) -> list[Entry]:
        folder = "train2017" if split == "train" else "val2017"
        name, key = self.list_name(split), f"data.{'train' if split == 'train' else 'eval'}_list"
        pictures, labels = self.files(f"{folder}.images"), self.files(f"{folder}.labels")
        if name == "full":
            return [Entry(stem, path, labels[stem]) for stem, path in pictures.items() if stem in labels]
        path = self.list_file(name, folder)
        if not path.is_file():
            raise DataError(f"{key}={name}: there is no file {path}; {self._remedy(name)}")
        ids = read_list(path)
        missing = [item for item in ids if item not in pictures]
        if missing or not ids:
            found = f"{len(missing)} of the {len(ids)} pictures of" if ids else "there is no id in"
            first = f" are not in {self.find(f'{folder}.images')}, the first is {missing[0]}" if ids else ""
            raise DataError(f"{key}={name}: {found} {path}{first}; {self._help}")
        return [Entry(item, pictures[item], labels.get(item)) for item in ids]

    def _remedy(self, name: str) -> str:
        if name == "curated7":
            return f"`run.py data name={self.data.name} root={self.data.root} rebuild=true` makes it from the labels"
        if name in LISTS:
            return self._help
        return f"expected {', '.join(LISTS)}, full, or a text file with one id a line"

    def official_count(self, split: str) -> int | None:
        folder = "train2017" if split == "train" else "val2017"
        return COUNTS.get(self.list_name(split), {}).get(folder)

    def more_checks(self, rebuild: bool) -> Iterator[Check]:
        """The lists: there, of the right length and content, and, with `rebuild`, equal to what their rule gives."""
        for name in LISTS:
            for folder in PUBLISHED:
                needed = name == self.list_name("train" if folder == "train2017" else "val")
                path = self.list_file(name, folder)
                if rebuild and name == "curated7":
                    yield self._rebuilt(path, folder)
                if path.is_file():
                    yield check_list(path, name, folder)
                elif needed:
                    yield Check(False, f"curated/{folder}/{path.name}", "absent", self._remedy(name))

    def _rebuilt(self, path: Path, folder: str) -> Check:
        what = f"rule of {path.name} on {folder}"
        labels = self.files(f"{folder}.labels", needed=False)
        if not labels:
            return Check(False, what, "no label files to read", "complete the parts above")
        ids = rule_list(labels)
        if not path.is_file():
            write_list(path, ids)
            return Check(True, what, f"{len(ids):,} ids of {len(labels):,} labels, written to {path}")
        same = ids == read_list(path)
        found = f"{len(ids):,} ids of {len(labels):,} labels, {'equal to' if same else 'not those of'} the list there"
        remedy = "" if same else "label files are missing or changed, or the list is another one; remove the wrong one"
        return Check(same, what, found, remedy)


def check_list(path: Path, name: str, folder: str) -> Check:
    """Length and, where it is known, checksum of a list file."""
    ids, expected = read_list(path), COUNTS[name][folder]
    known = CHECKSUMS.get((name, folder))
    digest = hashlib.md5("".join(f"{item}\n" for item in ids).encode(), usedforsecurity=False).hexdigest()
    if len(ids) != expected:
        text, good = f"{len(ids):,} of {expected:,} ids", False
    elif known is not None and digest != known:
        text, good = f"{len(ids):,} ids, but with the md5 {digest} instead of {known}", False
    else:
        text, good = f"{len(ids):,} ids{', checksum right' if known else ''}", True
    remedy = "" if good else "get the folder `curated` of github.com/janghyuncho/PiCIE again"
    return Check(good, f"curated/{folder}/{path.name}", text, remedy)
