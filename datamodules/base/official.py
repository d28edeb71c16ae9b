"""What the published data sets share: the layout as downloaded, found, counted and read.

A data set file says which parts its download has (`parts`), which pictures a split is made of (`entries`) and what its
label values mean (`label_map`). The same parts serve for reading, for the one line about what is absent, and for
`run.py data`.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from common.errors import ConfigError, DataError
from common.files import no_folder
from datamodules.base.label_map import LabelMap
from datamodules.base.listed import Entry, ListedSource, entries_below
from datamodules.base.module import SegmentationDataModule
from datamodules.facts import Facts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A folder of the layout: one kind of file, whose names end alike (in small or capital letters)."""

    what: str
    places: tuple[str, ...]
    """Where it may lie below the root; the first is the official one."""
    endings: tuple[str, ...]
    """Endings of its files, in small letters. What stands before them is the stem that pairs pictures with labels."""
    count: int | None
    """Files of the complete download."""
    fetch: str
    """The download that brings it."""
    deep: bool = False
    """True: files lie in sub-folders, which belong to the stem."""

    @property
    def wanted(self) -> str:
        """For people: `images/val2017 (pictures of val2017, *.jpg)`."""
        return f"{self.places[0]} ({self.what}, *{self.endings[0]})"

    def stem(self, name: str) -> str | None:
        """A relative file name without its ending; None for files of other kinds and other programs' leftovers."""
        low = name.lower()
        ending = next((ending for ending in self.endings if low.endswith(ending)), None)
        if ending is None or os.path.basename(name).startswith("."):
            return None
        return name[: -len(ending)]

    def files(self, folder: Path) -> dict[str, str]:
        """{stem: path} of its files in a folder, in the order of the stems."""
        found = {}
        for path, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if self.deep else []
            inside = os.path.relpath(path, folder)
            for name in sorted(names):
                stem = self.stem(name if inside == "." else f"{inside}/{name}".replace(os.sep, "/"))
                if stem is not None:
                    found.setdefault(stem, os.path.join(path, name))
        return dict(sorted(found.items()))

    def any_in(self, folder: Path) -> bool:
        """True where a folder holds one of its files."""
        for _, folders, names in os.walk(folder, followlinks=True):
            if any(self.stem(name) is not None for name in names):
                return True
            if not self.deep:
                folders.clear()
        return False


@dataclass(frozen=True)
class Check:
    """One line of `run.py data`."""

    ok: bool
    what: str
    found: str
    remedy: str = ""


class OfficialDataModule(SegmentationDataModule):
    """A published data set in its official layout below `data.root`.

    Raises ConfigError for settings that do not fit, DataError naming `data.root` for whatever is absent.
    """

    facts: ClassVar[Facts]
    folders: ClassVar[tuple[str, ...]] = ()
    """Sub-folders of the root that may hold the layout, as releases nested it."""
    variants: ClassVar[tuple[int, ...]] = ()
    """Numbers of classes that `data.classes` can choose."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self._files: dict[str, dict[str, str]] = {}
        if self.variants and self.data.classes not in self.variants:
            raise ConfigError(
                f"data.classes={self.data.classes}: data={self.data.name} has labels of "
                f"{' or '.join(str(count) for count in self.variants)} classes"
            )

    # ---- what a data set file writes ----

    def parts(self) -> dict[str, Part]:
        """The parts that the current settings read, by short names."""
        raise NotImplementedError

    def entries(self, split: str) -> list[Entry]:
        """The pictures of "train" or "val", each with its label where it has one; here: all of that split's parts."""
        return self.paired(f"{split}.images", f"{split}.labels")

    def label_map(self) -> LabelMap:
        """From the values in the label files to class ids."""
        raise NotImplementedError

    def official_count(self, split: str) -> int | None:
        """Pictures of a split as published, under the current settings; None where nothing is published."""
        raise NotImplementedError

    def make_source(self, entries: list[Entry]) -> ListedSource:
        """The reader of the entries; for label or picture files that are no ordinary pngs."""
        return ListedSource(entries, self.label_map())

    def more_checks(self, rebuild: bool) -> Iterator[Check]:
        """Further lines of `run.py data`; `rebuild`: lists that can be made from other files are made."""
        yield from ()

    # ---- what is the same for all ----

    @cached_property
    def base(self) -> Path:
        """The folder that holds the layout: `data.root`, or one of its sub-folders. Raises ConfigError, DataError."""
        parts = self.parts()
        if not self.data.root:
            raise ConfigError(
                f"data.root: data={self.data.name} needs the folder that holds {next(iter(parts.values())).places[0]}; "
                f"set data.root=<folder>; `run.py data name={self.data.name}` says what to fetch and from where"
            )
        root = Path(self.data.root).expanduser()
        if not root.is_dir():
            raise DataError(
                f"data.root={root}: {no_folder(root)}; data={self.data.name} expects "
                f"{next(iter(parts.values())).wanted} in it; {self._help}"
            )
        for base in (root, *(root / name for name in self.folders)):
            if any(part.any_in(base / place) for part in parts.values() for place in part.places):
                return base
        return root

    @property
    def _help(self) -> str:
        return f"`run.py data name={self.data.name}` says what to fetch and where it belongs"

    def find(self, name: str) -> Path | None:
        """The folder of a part; None where there is none with such files."""
        part = self.parts()[name]
        return next((self.base / place for place in part.places if part.any_in(self.base / place)), None)

    def files(self, name: str, needed: bool = True) -> dict[str, str]:
        """{stem: path} of a part's files; with `needed` raises DataError where there are none."""
        if name not in self._files:
            folder = self.find(name)
            self._files[name] = {} if folder is None else self.parts()[name].files(folder)
        if needed and not self._files[name]:
            raise DataError(f"data.root={self.data.root}: holds no {self.parts()[name].wanted}; {self._help}")
        return self._files[name]

    def paired(self, pictures: str, labels: str | None, prefix: str = "") -> list[Entry]:
        """All pictures of a part, each with the label of its stem; pictures may lack one."""
        found = {} if labels is None else self.files(labels)
        return [Entry(prefix + stem, path, found.get(stem)) for stem, path in self.files(pictures).items()]

    def chosen(
        self, names: list[str], pictures: dict[str, str], labels: dict[str, str], what: str, where: str, ending: str
    ) -> list[Entry]:
        """The pictures of a list of stems, in its order. Raises DataError where one is absent, or the list is empty.

        For the message: `what` the list names, `where` its files belong, and their `ending`.
        """
        missing = [name for name in names if name not in pictures]
        if missing or not names:
            raise DataError(
                f"data.root={self.data.root}: {len(missing)} of the {len(names)} {what} are not in {where}"
                f"{f', the first is {missing[0]}{ending}' if missing else ''}; {self._help}"
            )
        return [Entry(name, pictures[name], labels.get(name)) for name in names]

    def build_source(self, split: str) -> ListedSource:
        roots = list(self.data.train_roots or ()) if split == "train" else []
        if not roots:
            entries = self.entries(split)
            self._compare(split, len(entries))
        else:
            entries = [entry for root in roots for entry in self._other(root)]
        labelled = sum(entry.label is not None for entry in entries)
        log.info("%s: %s of %d pictures (%d with a label)", self.data.name, split, len(entries), labelled)
        if split == "val" and not labelled:
            raise DataError(
                f"data.root={self.data.root}: none of the {len(entries)} pictures to evaluate has a label; {self._help}"
            )
        return self.make_source(entries)

    def labelled_source(self) -> str | ListedSource:
        """The published training pictures, also where `data.train_roots` names others to train on."""
        return self.make_source(self.entries("train")) if self.data.train_roots else "train"

    def own_source(self) -> str | ListedSource:
        try:
            return self.labelled_source()
        except DataError:  # a copy that holds what is evaluated alone
            return "train"

    def source_below(self, roots: list[str], key: str) -> ListedSource:
        return self.make_source([entry for root in roots for entry in self._other(root, key)])

    def _other(self, root: str, key: str = "data.train_roots") -> list[Entry]:
        """Pictures of `data.train_roots`: those of `data.root` as published, all others without labels."""
        if Path(root).expanduser().resolve() == Path(self.data.root or "").expanduser().resolve():
            return self.entries("train")
        return entries_below(root, key)

    def _compare(self, split: str, count: int) -> None:
        official = self.official_count(split)
        if official is not None and count != official:
            log.warning(
                "%s: %s has %d pictures, the published split has %d: scores are not comparable with published ones",
                self.data.name, split, count, official,
            )  # fmt: skip

    def checks(self, rebuild: bool = False) -> Iterator[Check]:
        """What is there and what is missing, part by part. Raises ConfigError, DataError where there is no root."""
        for name, part in self.parts().items():
            found = len(self.files(name, needed=False))
            good = found > 0 if part.count is None else found == part.count
            expected = "" if part.count is None or good else f" of {part.count:,}"
            remedy = f"get {part.fetch}; it belongs into {part.places[0]}"
            folder = self.find(name)
            place = part.places[0] if folder is None else folder.relative_to(self.base).as_posix()
            yield Check(good, place, f"{found:,}{expected} {part.what}", "" if good else remedy)
        yield from self.more_checks(rebuild)
        for split in ("train", "val"):
            try:
                count, official = len(self.entries(split)), self.official_count(split)
            except DataError as error:
                yield Check(False, f"split {split}", "cannot be put together", str(error))
                continue
            good = official is None or count == official
            found = f"{count:,} pictures" + ("" if good else f", published: {official:,}")
            yield Check(good, f"split {split}", found, "" if good else "complete the parts above")
