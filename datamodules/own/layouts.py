"""Where a folder keeps its pictures and its labels, by the names that are in use; docs/data.md lists them.

Pictures lie in `images`, labels in a folder such as `labels` or `masks` beside it, in either order with the folders of
a split: `images/train` and `labels/train`, or `train/images` and `train/labels`. Letters may be of any case.
`data.images` and `data.labels` name folders that are called otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import DataError
from datamodules.files.reading import is_picture
from datamodules.files.walking import files_below, pictures
from datamodules.own.pairing import is_label

PICTURES = ("images", "jpegimages", "imgs", "image", "img")
"""Names of folders of pictures, in small letters; the first is that of the own layout."""
LABELS = ("labels", "masks", "annotations", "segmentationclass", "label", "mask")
"""Names of folders of labels, in small letters."""
SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
"""Names of the folders of a split."""
WHOLE = "all"
"""The one part of a folder that is not split."""


@dataclass(frozen=True)
class Part:
    """The pictures of one split below `folder`, and the folder of their labels."""

    folder: Path
    labels: Path | None = None
    beside: tuple[Path, ...] = ()
    """Folders of labels that lie below `folder`: no pictures."""

    def pictures(self) -> list[str]:
        """Paths relative to `folder`, with "/", sorted."""
        found = pictures(self.folder)
        for inner in self.beside:
            within = f"{inner.relative_to(self.folder).as_posix()}/"
            found = [name for name in found if not name.startswith(within)]
        return found


@dataclass(frozen=True)
class Layout:
    """The parts of a folder: `train` and `val`, one of them alone, or `all`."""

    parts: dict[str, Part]
    labels: tuple[Path, ...] = ()
    """Every folder that labels were found in."""


def find(root: Path, key: str, images: str = "auto", labels: str = "auto", optional: bool = False) -> Layout:
    """How a folder is laid out. `key` names it in errors; `images`, `labels`: `data.images`, `data.labels`; with
    `optional` they count only where these folders are there.

    Raises DataError where a named folder is missing, or where two folders could be meant.
    """
    if optional:
        images = images if images == "auto" or _named(root, images) else "auto"
        labels = labels if labels in ("auto", "none") or _named(root, labels) else "auto"
    folders = _picture_folders(root, key, images)
    known = bool(folders)
    found = {split: _label_folder(root, key, split, labels) for split in folders or (*SPLITS, WHOLE)}
    if not known:  # pictures in a folder called masks are pictures, unless there is something to be a label
        found = {split: folder if folder and files_below(folder, is_label) else None for split, folder in found.items()}
        apart = {split: folder for split, folder in _below(root).items() if found[split] is not None}
        folders = _below(root) if apart else {WHOLE: root}
    every = tuple(dict.fromkeys(folder for split in folders if (folder := found[split]) is not None))
    if (
        not known
        and every
        and not any(Part(folder, None, _inside(folder, every)).pictures() for folder in folders.values())
    ):
        raise DataError(
            f"{key}={root}: holds a folder {every[0].relative_to(root).as_posix()} but no folder images; put the "
            "pictures into images, or into images/train and images/val, or name their folder in data.images"
        )
    parts = {
        split: Part(folder, None if labels == "none" else found[split], _inside(folder, every))
        for split, folder in folders.items()
    }
    return Layout(parts, every)


def without_split(folder: str) -> str:
    """The value of a key for a folder: without the folder of a split in front or behind, which is found by itself."""
    parts = folder.split("/")
    names = {name for names in SPLITS.values() for name in names}
    while len(parts) > 1 and parts[0].lower() in names:
        parts = parts[1:]
    while len(parts) > 1 and parts[-1].lower() in names:
        parts = parts[:-1]
    return "/".join(parts)


def said(folders: tuple[Path, ...]) -> str:
    """Folders in words; those of a split by the one they lie in."""
    above = {folder.parent for folder in folders}
    if len(folders) > 1 and len(above) == 1:
        return str(above.pop())
    return " and ".join(map(str, folders))


def expected(root: Path, labels: str) -> str:
    """Where labels were looked for, in words."""
    if labels not in ("auto", "none"):
        return f"{root / labels}"
    return f"a folder labels, masks, annotations or SegmentationClass in {root}, beside that of the pictures"


def _picture_folders(root: Path, key: str, images: str) -> dict[str, Path]:
    """{split: folder of its pictures}; nothing where no folder has a name for pictures."""
    if images != "auto":
        found = _named(root, images)
        if not found:
            raise DataError(
                f"data.images={images}: there is no folder {root / images}, nor one of this name in {root}/train or "
                f"{root}/val; name a folder below {key}, or . for all of it"
            )
        return found
    top = _only(root, key, _children(root, PICTURES), is_picture, "pictures", "data.images")
    if top is not None:
        return _below(top) or {WHOLE: top}
    inner = {
        split: _only(folder, key, _children(folder, PICTURES), is_picture, "pictures", "data.images")
        for split, folder in _below(root).items()
    }
    return {split: folder for split, folder in inner.items() if folder is not None}


def _label_folder(root: Path, key: str, split: str, labels: str) -> Path | None:
    """The folder that holds the labels of a split; None where there is none."""
    if labels not in ("auto", "none"):
        found = _named(root, labels)
        if not found:
            raise DataError(
                f"data.labels={labels}: there is no folder {root / labels}, nor one of this name in {root}/train or "
                f"{root}/val; name a folder below {key}, or none to train without labels"
            )
        return found.get(split, root / labels if (root / labels).is_dir() else None)
    tops = _children(root, LABELS)
    own = [folder for top in tops if (folder := _below(top).get(split)) is not None]
    if split != WHOLE and split in _below(root):
        own += _children(_below(root)[split], LABELS)
    chosen = _only(root, key, own, is_label, "labels", "data.labels")
    return chosen or _only(
        root, key, [top for top in tops if split == WHOLE or not _below(top)], is_label, "labels", "data.labels"
    )


def _named(root: Path, name: str) -> dict[str, Path]:
    """{split: folder} of a folder named by a key: `<name>`, `<name>/train`, or `train/<name>`; nothing without it."""
    if (root / name).is_dir():
        return _below(root / name) or {WHOLE: root / name}
    return {split: folder / name for split, folder in _below(root).items() if (folder / name).is_dir()}


def _only(
    root: Path, key: str, folders: list[Path], wanted: Callable[[str], bool], what: str, setting: str
) -> Path | None:
    """The one of these folders that holds files of a kind, or the only one. Raises DataError where several do."""
    if len(folders) > 1:
        folders = [folder for folder in folders if files_below(folder, wanted)]
    if len(folders) > 1:
        names = [folder.relative_to(root).as_posix() for folder in folders[:2]]
        raise DataError(
            f"{key}={root}: {' and '.join(names)} could both hold the {what}; name one of them, as {setting}="
            f"{without_split(names[0])}"
        )
    return folders[0] if folders else None


def _below(folder: Path) -> dict[str, Path]:
    """{split: folder} of the folders of a split directly in a folder."""
    found = {split: _children(folder, names) for split, names in SPLITS.items()}
    return {split: folders[0] for split, folders in found.items() if folders}


def _children(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The folders in a folder that have one of these names in any case of letters, in the order of the names."""
    try:
        inner = [path for path in sorted(folder.iterdir()) if path.name.lower() in names and path.is_dir()]
    except OSError:
        return []
    return sorted(inner, key=lambda path: names.index(path.name.lower()))


def _inside(folder: Path, others: tuple[Path, ...]) -> tuple[Path, ...]:
    return tuple(other for other in others if folder in other.parents)
