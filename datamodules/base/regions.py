"""Region maps of training pictures: files that are there, or files that are computed once and kept in `cache.dir`.

One format for both, that of the releases of SegSort and HSG: a grey png of 8 or 16 bit for each picture, as large as
the picture, whose values are region ids. Only equality matters, every value may be a region, also 255. Computed ones
carry a check sum as a text chunk. Nothing here reads a label.
"""

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.utils.data import DataLoader, Dataset

from common import distributed
from common.errors import ConfigError, DataError
from common.files import make_output, no_folder, whole
from common.formats.sums import SUM, checksum, read_sealed, write_sealed
from common.spec import RegionSpec
from datamodules.base.cache import PROGRESS, together
from datamodules.files.opening import opened
from datamodules.files.reading import UnreadableError, fingerprint, is_picture, read_label

log = logging.getLogger(__name__)

FORMAT = 2
"""Raised when over-segmentation changes, so that files of before are not found any more."""
SHARE = 1000
"""Files of a folder of the cache."""
FINISHED = "finished.json"
"""Written last into a folder of the cache; it says how many files there are."""


class RegionFiles:
    """The region file of every picture of a split. plan: what the files were computed by; None for given ones."""

    def __init__(self, files: list[str], plan: "RegionPlan | None" = None) -> None:
        self.files, self.plan = files, plan

    def __len__(self) -> int:
        return len(self.files)

    def read(self, picture: int, size: tuple[int, int]) -> np.ndarray:
        """Region ids of a picture of `size` (height, width): int32 [H,W]. Computed ones that are broken or gone are
        computed again.

        Raises:
            UnreadableError: a broken file.
            DataError: a colour picture, or a map of another size than its picture.
        """
        try:
            return self._read(self.files[picture], size)
        except DataError as error:
            if self.plan is None:
                raise
            log.warning("%s; its regions are computed again", error)
        ids = self.plan.compute(picture)
        with contextlib.suppress(OSError):  # a disk that cannot be written to any more
            self.plan.keep(Path(self.files[picture]), ids)
        return ids.astype(np.int32)

    def _read(self, path: str, size: tuple[int, int]) -> np.ndarray:
        ids = computed(path) if self.plan else read_label(path, "a region file holds one region id per pixel")
        ids = ids.astype(np.int32)
        if ids.shape != tuple(size):
            raise DataError(
                f"{path}: this region map is {ids.shape[0]} x {ids.shape[1]} pixels and its picture "
                f"{size[0]} x {size[1]}; make it again from the picture as it is"
            )
        return ids


def given(source: Any, root: str | Path, key: str = "method.regions.root") -> RegionFiles:
    """Files of a folder, named like the pictures (`<root>/<id of the picture>.png`, without the picture's ending).

    key: the one that named the folder. Raises DataError where there is no such folder, or a picture has no file.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataError(f"{key}={root}: {no_folder(root)}")
    files = []
    for index in range(len(source)):
        name = source.id(index)
        path = root / f"{os.path.splitext(name)[0] if is_picture(Path(name).name) else name}.png"
        if not path.is_file():
            raise DataError(
                f"{key}={root}: picture '{name}' has no region file; expected {path}, a grey png of "
                "region ids as large as the picture"
            )
        files.append(str(path))
    return RegionFiles(files)


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """Regions to be computed from the pictures of a split, and the folder they go into."""

    name: str
    source: Any
    spec: RegionSpec
    segment: Callable[[np.ndarray, RegionSpec], np.ndarray]
    """From a picture uint8 [H,W,3] to ids [H,W] (`grouping.regions.over_segment`)."""
    folder: Path
    workers: int = 0

    @property
    def fingerprint(self) -> str:
        """sha256 of everything that the regions depend on: settings, library, and the identity of the pictures."""
        facts = [FORMAT, dataclasses.asdict(self.spec), metadata.version("scikit-image"), self.name]
        return fingerprint(json.dumps(facts), self.source)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.name}-{self.fingerprint[:20]}"

    def file(self, path: Path, picture: int) -> Path:
        return path / f"{picture // SHARE:04d}" / f"{picture:07d}.png"

    def compute(self, picture: int) -> np.ndarray:
        """Region ids of a picture, uint8 or uint16 [H,W]. Raises UnreadableError for one that cannot be read."""
        ids = self.segment(self.source.read(picture)[0][..., :3], self.spec)
        return ids.astype(np.uint8 if ids.max() < 256 else np.uint16)

    def keep(self, path: Path, ids: np.ndarray) -> None:
        """Write a region file, whole. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            note = PngInfo()
            note.add_text(SUM, str(checksum(ids)))
            Image.fromarray(ids).save(temporary, format="PNG", pnginfo=note)


def provide(plan: RegionPlan) -> RegionFiles:
    """The region files of a plan, computed where they are not there yet. A collective.

    A kill leaves whole files, and the next start computes the others. Ranks share the work; a machine that does not see
    the files of another one makes its own. Raises ConfigError, on every rank, where the folder cannot be written to.
    """
    path = plan.path
    rank, world = distributed.rank(), distributed.world_size()
    together(_build(plan, path, range(rank, len(plan.source), world)))
    first_here = distributed.local_rank() == 0
    together(_build(plan, path, range(len(plan.source))) if first_here else None)
    if first_here and not finished(path):
        write_sealed(path / FINISHED, {"spec": dataclasses.asdict(plan.spec), "files": count(path)})
    return RegionFiles([str(plan.file(path, picture)) for picture in range(len(plan.source))], plan)


def computed(path: str) -> np.ndarray:
    """The ids of a file of the cache, uint8 or uint16 [H,W]. Raises UnreadableError where they are not those written:
    the decoder of pngs passes over some changed bytes."""
    try:
        with opened(path) as image:
            ids, of_ids = np.asarray(image), image.info.get(SUM)
    except Exception as error:  # the decoder raises several kinds for damaged files
        raise UnreadableError(path, " ".join(str(error).split()) or type(error).__name__) from error
    if of_ids != str(checksum(ids)):
        raise UnreadableError(path, "changed since it was written")
    return ids


def count(path: Path) -> int:
    """Region files of a folder of the cache that are not empty."""
    shares = [share for share in path.iterdir() if share.is_dir()] if path.is_dir() else []
    entries = (entry for share in shares for entry in os.scandir(share))
    return sum(entry.name.endswith(".png") and entry.stat().st_size > 0 for entry in entries)


def finished(path: Path) -> bool:
    """Whether all files are there that were when the folder was finished."""
    try:
        return read_sealed(path / FINISHED)["files"] == count(path)
    except (OSError, ValueError, KeyError):
        return False


def _build(plan: RegionPlan, path: Path, pictures: range) -> Iterator[None]:
    """Writes the files that are missing of these pictures, a step for each; none for a picture that cannot be read."""
    if finished(path):
        return
    missing = [picture for picture in pictures if not there(plan.file(path, picture))]
    if not missing:
        return
    if (path / FINISHED).is_file():
        log.warning("%s: %d region files are gone or empty; they are made anew", path, len(missing))
    elif len(missing) == len(pictures):
        log.info("regions (%s): computing those of %d pictures once into %s", plan.spec.source, len(pictures), path)
    said = time.monotonic()
    try:
        make_output(path)
        loader = DataLoader(_Pictures(plan, missing), batch_size=None, num_workers=plan.workers, collate_fn=_as_it_is)
        for done, (picture, ids) in enumerate(zip(missing, loader, strict=True)):
            if ids is not None:
                plan.keep(plan.file(path, picture), ids)
            if time.monotonic() - said > PROGRESS:
                said = time.monotonic()
                log.info("regions (%s): %d of %d pictures", plan.spec.source, done + 1, len(missing))
            yield
    except OSError as error:
        raise ConfigError(
            f"cache.dir={plan.folder}: region files cannot be written ({error.strerror or error}); name a folder on a "
            "disk with room"
        ) from error


def there(path: Path) -> bool:
    """Whether there is a file with something in it."""
    return path.is_file() and path.stat().st_size > 0


class _Pictures(Dataset):
    """The regions of each of some pictures, uint16 [H,W]; None for a picture that cannot be read."""

    def __init__(self, plan: RegionPlan, pictures: list[int]) -> None:
        self.plan, self.pictures = plan, pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> np.ndarray | None:
        try:
            return self.plan.compute(self.pictures[index])
        except UnreadableError:
            return None  # it is named and counted when training meets it


def _as_it_is(item: Any) -> Any:
    return item
