"""From keys to batches: reading with replacement of broken files, padding collate, and errors that survive workers.

A DataLoader re-raises a worker's exception as "Caught … in DataLoader worker process" with a traceback in the text.
So errors of the user's data travel as data, and `CheckedLoader` raises them in the main process, as they were.
"""

import logging
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import chance, distributed
from common.errors import DataError, LabelfreeError
from common.spec import IGNORE, OUTSIDE
from datamodules.base import shapes
from datamodules.base.decoded import ChangedError, DecodedStore
from datamodules.base.instances import Instances
from datamodules.base.label_map import Foreign, ForeignIds
from datamodules.base.transforms import Geometry
from datamodules.files.reading import UnreadableError, unreadable

log = logging.getLogger(__name__)

REPLACEMENTS = 20
"""Pictures tried in the place of a broken one before the data are given up."""
FEWEST_BROKEN = 3
"""Fewer unreadable files than this never stop a run."""


class IdMaps(Protocol):
    """Ids beside every picture: `regions.RegionFiles`, a view of pseudo-labels (`pseudo_labels.views.View`)."""

    def read(self, picture: int, size: tuple[int, int]) -> np.ndarray:
        """Ids int [H,W] of a picture of `size` (height, width)."""


@dataclass
class Item:
    """One picture after geometry, or what went wrong instead (`image` is None then)."""

    image: np.ndarray | None = None
    label: np.ndarray | None = None
    regions: np.ndarray | None = None
    pseudo: np.ndarray | None = None
    index: int = 0
    id: str = ""
    size: tuple[int, int] = (0, 0)
    instances: Instances | None = None
    broken: list[tuple[str, str]] = field(default_factory=list)
    foreign: Foreign = field(default_factory=dict)
    error: LabelfreeError | None = None
    neighbour: "Item | None" = None
    """A near picture; where the data set has a table of neighbours."""


class PictureDataset(Dataset):
    """Reads and crops one picture per key (pass, index); crops are keyed by (seed, purpose, pass, index).

    With five crops item i is crop i % 5 of picture i // 5. A picture that cannot be read is left out, or, with
    `replace_broken`, another one takes its place, keyed as well.

    store: pictures decoded and resized before (`decoded.DecodedStore`); then nothing is decoded here.
    cache: without a store, megabytes of resized pictures that each reading process keeps, so that small sets are
    decoded once. What does not fit any more is read again each time.

    regions: contour regions beside every picture (`regions.RegionFiles`). pseudo: pseudo-labels beside every picture,
    `pseudo_labels.views.View`. instances: objects one by one beside every picture, where its source has them.

    neighbours: int64 [items,k]; each item then comes with one of the k items of its row, drawn by (pass, index) and cut
    and mirrored by a draw of its own.

    usable: bool [pictures]; one of those that are takes the place of each that is not, as of one that cannot be read.
    """

    def __init__(
        self,
        source: Any,
        geometry: Geometry,
        has_labels: bool,
        seed: int,
        purpose: str,
        replace_broken: bool = False,
        flip: bool = False,
        cache: float = 0.0,
        store: DecodedStore | None = None,
        neighbours: np.ndarray | None = None,
        regions: IdMaps | None = None,
        pseudo: IdMaps | None = None,
        instances: bool = False,
        usable: np.ndarray | None = None,
    ) -> None:
        self.source = source
        self.geometry = geometry
        self.has_labels = has_labels
        self.seed = seed
        self.purpose = purpose
        self.replace_broken = replace_broken
        self.flip = flip
        self.store = store
        self.room = 0 if store is not None else int(cache * 2**20)
        self.kept: dict[int, tuple[np.ndarray, np.ndarray | None, tuple[int, int]]] = {}
        self.neighbours = neighbours
        self.extra = {name: files for name, files in (("regions", regions), ("pseudo", pseudo)) if files is not None}
        self.kept_maps: dict[tuple[str, int], np.ndarray] = {}
        self.instances = instances and hasattr(source, "instances")
        self.usable = None if usable is None else np.repeat(usable, geometry.crops)
        self.pool = None if usable is None else np.flatnonzero(self.usable)

    def __len__(self) -> int:
        return len(self.source) * self.geometry.crops

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        number, index = key if isinstance(key, tuple) else (0, key)
        try:
            item = self._readable(self.purpose, number, index, index)
            if self.neighbours is not None and item.image is not None:
                row = self.neighbours[item.index]
                draw = chance.numpy_generator(self.seed, f"{self.purpose}.neighbour", number, index)
                chosen = int(row[draw.integers(len(row))])
                near = self._readable(f"{self.purpose}.neighbour", number, index, chosen)
                item.broken += near.broken
                item.foreign |= near.foreign
                item.neighbour = near
            return item
        except LabelfreeError as error:
            return Item(error=error)

    def _readable(self, purpose: str, number: int, index: int, wanted: int) -> Item:
        """Item `wanted`, or another one in its place; draws belong to (purpose, number, index)."""
        item, taken = Item(), wanted
        for attempt in range(REPLACEMENTS + 1):
            try:
                if self.usable is None or self.usable[taken]:
                    return self._read(item, purpose, number, index, taken)
            except UnreadableError as error:
                item.broken.append((error.file, str(error)))
            if not self.replace_broken:
                return item
            draw = chance.numpy_generator(self.seed, f"{purpose}.replacement", number, index, attempt)
            taken = int(draw.integers(len(self)) if self.pool is None else draw.choice(self.pool))
        raise DataError(f"{item.broken[0][1]}; {REPLACEMENTS} other pictures in its place cannot be read either")

    def _read(self, item: Item, purpose: str, number: int, index: int, taken: int) -> Item:
        if self.store is not None:
            image, label, item.size = self._stored(taken)
        else:
            image, label, item.size = self.kept.get(taken) or self._resized(taken)
            item.foreign |= take_foreign(self.source)
        maps = {} if label is None else {"label": label}
        maps |= {name: self._map(name, taken, item.size) for name in self.extra}
        draw = chance.numpy_generator(self.seed, f"{purpose}.crop", number, index)
        layers = list(maps.values())
        together = None if not maps else layers[0] if len(maps) == 1 else np.dstack(layers)
        item.image, together = self.geometry.finish(image, together, draw, flip=self.flip)
        for place, name in enumerate(maps):
            setattr(item, name, together if len(maps) == 1 else together[..., place])
        item.index, item.id = taken, self.source.id(taken // self.geometry.crops)
        if self.instances and (found := self.source.instances(taken // self.geometry.crops)) is not None:
            draw = chance.numpy_generator(self.seed, f"{purpose}.crop", number, index)
            item.instances = found.fitted(self.geometry, taken % self.geometry.crops, draw, self.flip)
        return item

    def _stored(self, index: int) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
        """An item of the store; decoded again, and put back, where the disk gives back something else."""
        try:
            return self.store[index]
        except ChangedError:
            log.warning(
                "%s: picture %s is not what was written; it is decoded again from its file",
                self.store.path, self.source.id(index // self.geometry.crops),
            )  # fmt: skip
        found = self._resized(index)
        self.store.mend(index, *found[:2])
        return found

    def _resized(self, index: int) -> tuple[np.ndarray, np.ndarray | None, tuple[int, int]]:
        picture, crop = divmod(index, self.geometry.crops)
        image, label = read_pair(self.source, picture, self.has_labels)
        size = image.shape[:2]
        image, label = fitted(self.source, picture, self.geometry, image, label, crop)
        needed = image.nbytes + (0 if label is None else label.nbytes)
        if needed <= self.room:
            self.room -= needed
            self.kept[index] = image, label, size
        return image, label, size

    def _map(self, name: str, index: int, size: tuple[int, int]) -> np.ndarray:
        """int32, as large as the resized picture; `size` is that of the picture in its file."""
        if (name, index) in self.kept_maps:
            return self.kept_maps[name, index]
        picture, crop = divmod(index, self.geometry.crops)
        found = self.geometry.resize_map(self.extra[name].read(picture, size), crop)
        if index in self.kept and found.nbytes <= self.room:
            self.room -= found.nbytes
            self.kept_maps[name, index] = found
        return found


def read_pair(source: Any, picture: int, has_labels: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Picture uint8 [H,W,3] and label [H,W], all 255 where this one has none; None where the data set has none."""
    image, label = read_of(source, picture)
    if not has_labels:
        return image, None
    return image, np.full(image.shape[:2], IGNORE, dtype=np.uint8) if label is None else label


def read_of(source: Any, picture: int) -> tuple[np.ndarray, np.ndarray | None]:
    """What a source's own `read` gives, whoever wrote it.

    Raises UnreadableError where the system refuses a file (it is skipped like any other that cannot be read), DataError
    with one line for whatever else goes wrong in there, or comes out of it.
    """
    try:
        found = source.read(picture)
    except LabelfreeError:
        raise
    except OSError as error:
        file = error.filename or shapes.file_of(source, picture)
        raise UnreadableError(file, error.strerror or str(error)) from error
    except MemoryError as error:
        raise unreadable(shapes.file_of(source, picture), error) from error
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"{type(source).__name__}.read({picture}): {type(error).__name__}: {error} ({Path(place.filename).name}, "
            f"line {place.lineno}); mend the data set's own code"
        ) from error
    channels = getattr(source, "channels", 3)
    wanted = f"a picture uint8 [H,W,{channels}], and a label [H,W] of whole numbers or None"
    if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[0], np.ndarray)):
        raise DataError(f"{type(source).__name__}.read({picture}): gave no pair; expected {wanted}")
    image, label = found
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != channels:
        given = f"a picture {image.dtype} {list(image.shape)}"
        raise DataError(f"{type(source).__name__}.read({picture}): gave {given}; expected {wanted}")
    if label is not None and (label.shape != image.shape[:2] or label.dtype.kind not in "iu"):
        given = f"a label {label.dtype} {list(label.shape)} for a picture {list(image.shape)}"
        raise DataError(f"{type(source).__name__}.read({picture}): gave {given}; expected {wanted}")
    return image, label


def fitted(
    source: Any, picture: int, geometry: Geometry, image: np.ndarray, label: np.ndarray | None, crop: int = 0
) -> tuple[np.ndarray, np.ndarray | None]:
    """`Geometry.resize` of a picture of a source. Raises UnreadableError where its shape or the memory forbid it."""
    if shapes.is_long(geometry, *image.shape[:2]):
        shapes.expect_whole(shapes.file_of(source, picture), image.shape[:2], geometry)
    try:
        return geometry.resize(image, label, crop)
    except (MemoryError, OverflowError) as error:
        raise unreadable(shapes.file_of(source, picture), error) from error


def take_foreign(source: Any) -> Foreign:
    """Label values outside the table that a source has met since the last call; none where it has no table."""
    return source.take_foreign() if hasattr(source, "take_foreign") else {}


class Collate:
    """Items of any sizes to one batch: padded right and bottom to the largest, rounded up to `multiple` pixels.

    Padding is 0 in `image`, 255 in `label` and `pseudo`, -1 in `regions`, False in `valid` and in `instances`.
    """

    def __init__(self, multiple: int = 1, instances: bool = False) -> None:
        self.multiple, self.instances = multiple, instances

    def __call__(self, items: list[Item]) -> dict[str, Any]:
        for item in items:
            if item.error is not None:
                return {"error": item.error}
        broken = [entry for item in items for entry in item.broken]
        foreign = {file: values for item in items for file, values in item.foreign.items()}
        items = [item for item in items if item.image is not None]
        if not items:
            return {"broken": broken, "foreign": foreign}
        batch: dict[str, Any] = {}
        batch["image"], batch["valid"] = self._pictures([item.image for item in items])
        batch |= _maps(items, batch["image"])
        if items[0].neighbour is not None:
            near = [item.neighbour for item in items]
            batch["neighbour"], batch["neighbour.valid"] = self._pictures([item.image for item in near])
            maps = _maps(near, batch["neighbour"])
            batch |= {f"neighbour.{name}": values for name, values in maps.items()}
            batch["neighbour.index"] = torch.tensor([item.index for item in near])
        if self.instances:
            size = tuple(batch["image"].shape[-2:])
            found = [None if item.instances is None else item.instances.padded(size) for item in items]
            batch["instances"] = [None if one is None else one.masks for one in found]
            batch["instances.crowd"] = [None if one is None else one.crowd for one in found]
        batch["index"] = torch.tensor([item.index for item in items])
        batch["id"] = [item.id for item in items]
        batch["size"] = torch.tensor([item.size for item in items])
        batch["broken"], batch["foreign"] = broken, foreign
        return batch

    def _pictures(self, images: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Pictures float32 [B,C,H,W] in 0..1 and where they are not padding, bool [B,H,W]."""
        height, width = (max(image.shape[side] for image in images) for side in (0, 1))
        height, width = (-(-side // self.multiple) * self.multiple for side in (height, width))
        stacked = _stack(images, (height, width), 0).permute(0, 3, 1, 2).contiguous().float().div_(255)
        valid = torch.zeros(len(images), height, width, dtype=torch.bool)
        for inside, image in zip(valid, images, strict=True):
            inside[: image.shape[0], : image.shape[1]] = True
        return stacked, valid


def _maps(items: list[Item], images: Tensor) -> dict[str, Tensor]:
    """`label`, `regions` and `pseudo` of the items, int64 [B,H,W] as large as the pictures, where they have them."""
    size, maps = tuple(images.shape[-2:]), {}
    for name, fill in (("label", IGNORE), ("regions", OUTSIDE), ("pseudo", IGNORE)):
        if getattr(items[0], name) is not None:
            maps[name] = _stack([getattr(item, name) for item in items], size, fill).long()
    return maps


def _stack(arrays: list[np.ndarray], size: tuple[int, int], fill: int) -> Tensor:
    shape = (len(arrays), *size, *arrays[0].shape[2:])
    whole = np.full(shape, fill, arrays[0].dtype)
    for row, array in zip(whole, arrays, strict=True):
        row[: array.shape[0], : array.shape[1]] = array
    return torch.from_numpy(whole)


class BrokenFiles:
    """The distinct unreadable files of one split, as far as this process knows them.

    Each new one is logged. More than `share` of the split's pictures, and at least three, raise DataError.
    """

    def __init__(self, split: str, share: float, total: int = 0) -> None:
        self.split = split
        self.share = share
        self.total = total
        self.files: dict[str, str] = {}

    def add(self, found: Mapping[str, str], told: bool = False) -> None:
        """Takes {file: message}; files known already count once. `told`: another process has logged them."""
        new = {file: message for file, message in found.items() if file not in self.files}
        for message in () if told else new.values():
            log.warning("%s; it is skipped", message)
        self.files.update(new)
        if len(self.files) >= FEWEST_BROKEN and len(self.files) > self.share * self.total:
            first = "; ".join(sorted(self.files.values())[:FEWEST_BROKEN])
            raise DataError(
                f"{len(self.files)} of the {self.total} pictures of '{self.split}' cannot be read, more than "
                f"data.max_broken={self.share:g} allows; mend or remove them, or raise data.max_broken: {first}"
            )

    def sync(self) -> None:
        """The files of all ranks together, on every rank (a collective)."""
        if not distributed.active():
            return
        parts: list[dict[str, str]] = [{} for _ in range(distributed.world_size())]
        dist.all_gather_object(parts, self.files)
        self.add({file: message for part in parts for file, message in part.items()}, told=True)


class CheckedLoader(DataLoader):
    """A DataLoader that raises the errors of the user's data in the main process and keeps account of broken files and
    of label values that no table knows.

    Batches in which no picture could be read are not given out. Raises LabelfreeError while iterating.
    """

    def __init__(self, dataset: PictureDataset, broken: BrokenFiles, foreign: ForeignIds, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.account = broken
        self.foreign = foreign

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in super().__iter__():
            if "error" in batch:
                raise batch["error"]
            self.account.add(dict(batch["broken"]))
            self.foreign.add(batch.pop("foreign"))
            batch["broken"] = [message for _, message in batch["broken"]]
            if "image" in batch:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """For Lightning's checkpoint: what the order of the batches was made from. Positions follow from the step."""
        return {"items": len(self.dataset), "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Warns where a resumed run finds another data set than the one it was stopped on."""
        if state != self.state_dict():
            log.warning(
                "The training set had %d items in %d batches when this run was stopped and has %d in %d now: the run "
                "goes on with other batches than it would have seen",
                *state.values(),
                *self.state_dict().values(),
            )
