"""What every data set shares: a `Source` of pictures in, batches out (`dataset.Collate` says what one holds).

A data set is one file with one subclass of `SegmentationDataModule` that says where pictures come from (`build_source`)
and what the classes are called (`build_meta`). Splitting over devices, order, crops, broken files and views are here.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import lightning as L
import numpy as np
import torch

from common import about, distributed
from common.errors import ConfigError, DataError, did_you_mean
from common.files import cache_folder
from common.spec import ClassMeta, ViewSpec
from datamodules.base import cache, sampling, views
from datamodules.base.dataset import BrokenFiles, CheckedLoader, Collate, PictureDataset
from datamodules.base.decoded import DecodedStore
from datamodules.base.label_map import ForeignIds
from datamodules.base.regions import RegionFiles
from datamodules.base.transforms import Geometry
from datamodules.facts import available
from datamodules.files import reading

__all__ = ["SegmentationDataModule", "Source", "load_datamodule"]


class Source(Protocol):
    """One split of a data set, at the pictures' own size.

    `read(i)` gives (image uint8 [H,W,3], label integer [H,W] with 255 = ignore, or None where the picture has none) and
    is a pure function of i: it is called in worker processes, in any order. A picture that cannot be read raises
    `files.reading.UnreadableError` (a DataError): it is named, counted and skipped. Any other LabelfreeError
    stops the run at once with its line.
    A source may also have `check() -> dict[file, message]`: the unreadable files that a quick look at the start finds;
    and `labelled() -> list[int]`: the indices of the pictures that have a label, where not all of them have;
    `instances(i) -> instances.Instances | None`, the objects of a picture one by one, for validation alone;
    `fingerprint() -> str`, which changes whenever a picture or label does (`data.cache` needs it); `size(i)`, the
    (height, width) of a picture without decoding it; `take_foreign()`, see `label_map.py`.
    """

    def __len__(self) -> int: ...

    def id(self, index: int) -> str: ...

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray | None]: ...


class SegmentationDataModule(L.LightningDataModule):
    """Batches of one data set for training, validation and offline passes.

    After `setup`: `meta` (class names; empty without labels) and `source(split)`. The runner assigns `views`
    ({name: ViewSpec}, made on the device in training) and `pad_multiple` (pixels; every batch is padded to a multiple
    of it, for backbones that need whole patches), both before the loaders are made. So it does with `neighbours`, an
    int64 array [training items, k], where the method wants a near picture beside each, and with `regions`, a
    `regions.RegionFiles` of the training pictures, where it wants contour regions, and with `pseudo`, a
    `pseudo_labels.views.View` of them, where it learns from pseudo-labels, and with `usable`, bool [pictures], where it
    learns from some of them alone: another picture takes the place of each of the others. `instances`: True where
    validation scores objects.

    A batch: `image` float32 [B,3,H,W] in 0..1, not normalised; `label` int64 [B,H,W], 255 = ignore (absent when the
    data has none); `valid` bool [B,H,W], false on padding; `index` int64 [B], position in the data set (with
    five crops 5 * picture + crop); `id` list of B names; `size` int64 [B,2], height and width of the picture in its
    file; `broken` list of messages on unreadable files; in training the views, see `views.py`; with
    regions `regions` int64 [B,H,W], -1 outside the picture, with pseudo-labels `pseudo` int64 [B,H,W], 255 = none,
    and with neighbours `neighbour` float32 [B,3,H',W'], `neighbour.valid` bool [B,H',W'], `neighbour.index` int64 [B]
    and its own maps, `neighbour.{label,regions,pseudo}`; in validation with instances `instances`, a list of B bool
    [n,H,W], and `instances.crowd`, of B bool [n] (groups that count neither way), None for a picture without any note
    of its objects.

    Raises ConfigError where a `data.*` key does not fit the rest.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.data = cfg.data
        self.seed = int(cfg.seed)
        self.views: dict[str, ViewSpec] = {}
        self.pad_multiple = 1
        self.neighbours: np.ndarray | None = None
        self.regions: RegionFiles | None = None
        self.pseudo: Any = None
        self.instances = False
        self.usable: np.ndarray | None = None
        self.view_steps: int | None = None
        self.meta = ClassMeta()
        self.broken = {split: BrokenFiles(split, float(self.data.max_broken)) for split in ("train", "val")}
        self.foreign = {split: ForeignIds(split) for split in ("train", "val")}
        self._stores: dict[tuple[str, Geometry], DecodedStore] = {}
        self._sources: dict[str, Source] = {}
        self._clustered: dict[tuple[str, ...], str | Source] = {}
        self.train_geometry = Geometry.from_config(self.data, "train")
        self.eval_geometry = Geometry.from_config(self.data, "eval")

    # ---- what a data set file writes ----

    def build_source(self, split: str) -> Source:
        """The pictures of `split` ("train" or "val")."""
        raise NotImplementedError

    def build_meta(self) -> ClassMeta:
        """Names and colours of the classes; called after the sources are built (`self.source(split)` works)."""
        raise NotImplementedError

    def settled(self) -> dict[str, Any]:
        """Values of `data.*` keys that only the pictures could tell, for the checkpoint; called after `setup`."""
        return {}

    # ---- state ----

    def setup(self, stage: str | None = None) -> None:
        """Finds the pictures and the classes. Called by Lightning on every rank; a second call changes nothing."""
        if self._sources:
            return
        sources = {split: self.build_source(split) for split in ("train", "val")}
        self._sources = sources
        self.meta = self.build_meta()
        for split, source in sources.items():
            self.broken[split].total = len(source)
            check = getattr(source, "check", None)
            if check is not None:
                self.broken[split].add(check())

    def source(self, split: str) -> Source:
        """The pictures of a split; sets the module up where that has not happened yet."""
        self.setup()
        return self._sources[split]

    def labelled_source(self) -> str | Source:
        """The training pictures whose labels a read-out may read: "train", unless other pictures are trained on."""
        return "train"

    def own_source(self) -> str | Source:
        """The training pictures of the data that is evaluated: "train", unless other pictures are trained on and it has
        some of its own."""
        return "train"

    def source_below(self, roots: list[str], key: str) -> Source:
        """All pictures of some folders, without labels; `key` names them in errors. Raises DataError."""
        raise ConfigError(f"{key}={list(roots)}: data={self.data.name} reads no folders of pictures; set [own]")

    def clustered_source(self) -> str | Source:
        """The pictures whose codes the k-means of the protocol is fitted on (`evaluation.kmeans.roots`): the own ones
        of the data that is evaluated, those trained on, or those of given folders. Raises ConfigError, DataError."""
        key, roots = "evaluation.kmeans.roots", list(self.cfg.evaluation.kmeans.roots)
        if roots == ["trained"]:
            return "train"
        alone = roots == ["own"]
        if not alone and {"own", "trained"} & set(roots):
            raise ConfigError(f"{key}={roots}: own and trained stand alone; name folders only, or one of the two")
        if (*roots,) not in self._clustered:  # folders are walked once
            self.setup()
            self._clustered[(*roots,)] = self.own_source() if alone else self.source_below(roots, key)
        return self._clustered[(*roots,)]

    def clustered_count(self) -> int:
        """How many pictures `clustered_source` has."""
        found = self.clustered_source()
        return len(self.source(found) if isinstance(found, str) else found)

    def describe(self, split: str) -> str:
        """What a split is, for metrics.json: its pictures, and the list they come from where there is one."""
        return f"{split}: {len(self.source(split))} pictures"

    def dataset(
        self,
        split: str | Source,
        geometry: Geometry,
        purpose: str,
        replace: bool = False,
        flip: bool = False,
        room: float = 0.0,
        store: DecodedStore | None = None,
        neighbours: np.ndarray | None = None,
        regions: RegionFiles | None = None,
        pseudo: Any = None,
        instances: bool = False,
        usable: np.ndarray | None = None,
    ) -> PictureDataset:
        """The map-style data set behind a loader; takes keys (pass, index) or plain indices."""
        source = self.source(split) if isinstance(split, str) else split
        return PictureDataset(
            source,
            geometry,
            self.meta.has_labels,
            self.seed,
            purpose,
            replace,
            flip,
            cache=room,
            store=store,
            neighbours=neighbours,
            regions=regions,
            pseudo=pseudo,
            instances=instances,
            usable=usable,
        )

    def _decoded(self, split: str, geometry: Geometry, make: bool) -> DecodedStore | None:
        """The decoded pictures of a split (`data.cache`); None without. `make`: all ranks call, and one writes them."""
        mode = str(self.data.get("cache") or "none")
        if mode == "none" or (split, geometry) in self._stores:
            return self._stores.get((split, geometry))
        if mode == "ram" and not make:
            return None
        plan = cache.Plan(
            name=str(self.data.name),
            split=split,
            source=self.source(split),
            geometry=geometry,
            has_labels=self.meta.has_labels,
            mode=mode,
            folder=cache_folder(self.cfg) / "decoded" if mode == "disk" else cache.memory_folder(),
            workers=self._workers(len(self.source(split))),
        )
        store = cache.provide(plan) if make else plan.find()
        if store is not None:
            self._stores[split, geometry] = store
            self.foreign[split].add(store.foreign)
        return store

    @property
    def fixed_geometry(self) -> Geometry:
        """That of training without chance: the same crop of a picture each time (the middle for random crops)."""
        crop = "center" if self.train_geometry.crop == "random" else self.train_geometry.crop
        return dataclasses.replace(self.train_geometry, crop=crop, flip_p=0.0)

    def fingerprint(self, split: str, geometry: Geometry) -> str:
        """Names the pictures of a split and their geometry: for files that hold what was computed from them.

        sha256, hexadecimal, of the data set's name, the geometry, the source's own fingerprint where it has one, and
        the id of every picture, in order.
        """
        return reading.fingerprint(f"{self.data.name} {geometry}", self.source(split))

    @property
    def local_batch(self) -> int:
        """Training pictures a device takes at each step: `data.batch_size` is the global batch."""
        size, world = int(self.data.batch_size), distributed.world_size()
        if size < 1 or size % world:
            raise ConfigError(
                f"data.batch_size={size}: the global batch is split evenly over {world} devices, so it must be a "
                f"positive multiple of {world}; set data.batch_size={max(1, round(size / world)) * world}"
            )
        return size // world

    @property
    def train_items(self) -> int:
        """Training items an epoch is drawn from: pictures, or five crops of each."""
        return len(self.source("train")) * self.train_geometry.crops

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches of an epoch; the incomplete last one is dropped.

        Raises DataError when there are fewer training pictures than one global batch.
        """
        size = int(self.data.batch_size)
        if self.train_items < size:
            raise DataError(
                f"data.batch_size={size}: the training set has only {self.train_items} pictures and a batch takes each "
                f"at most once; set data.batch_size={max(1, self.train_items)} or less, or add pictures"
            )
        return self.train_items // size

    # ---- loaders ----

    def train_dataloader(self) -> CheckedLoader:
        """Step s of the run gets the same global batch whatever happened before it, also after a resume.

        s is `trainer.global_step`, which counts batches as long as one optimiser steps once a batch.
        """
        trainer = self.trainer
        if trainer is not None and trainer.accumulate_grad_batches != 1:
            raise ConfigError(
                f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: must be 1, because step numbers "
                "choose the batch; set a larger data.batch_size instead"
            )
        local = self.local_batch
        order = sampling.TrainBatches(
            length=self.train_items,
            steps_per_epoch=self.steps_per_epoch,
            batch_size=local * distributed.world_size(),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            seed=self.seed,
            start=(lambda: 0) if trainer is None else (lambda: trainer.global_step),
        )
        store = self._decoded("train", self.train_geometry, make=True)
        data = self.dataset(
            "train",
            self.train_geometry,
            "train",
            replace=True,
            flip=True,
            room=self._cache(self.train_items),
            store=store,
            neighbours=self.neighbours,
            regions=self.regions,
            pseudo=self.pseudo,
            usable=self.usable,
        )
        return self._loader(data, order, "train", len(order) * local, persistent=True)

    def val_dataloader(self) -> CheckedLoader:
        """Every picture of `val` exactly once over all ranks: rank r takes r, r + world, … without padding.

        Raises DataError when there are fewer pictures than ranks, because a rank without a batch would wait for ever.
        """
        if len(self.source("val")) < distributed.world_size():
            raise DataError(
                f"trainer.devices: the validation split has {len(self.source('val'))} pictures for "
                f"{distributed.world_size()} devices, and each needs at least one; use fewer devices or add pictures"
            )
        store = self._decoded("val", self.eval_geometry, make=True)
        room = self._cache(len(self.source("val")))
        data = self.dataset("val", self.eval_geometry, "val", room=room, store=store, instances=self.instances)
        indices = sampling.stride(len(data), distributed.rank(), distributed.world_size())
        batches = sampling.FixedBatches(
            [(0, i) for i in indices], self._share(int(self.data.eval_batch_size), "data.eval_batch_size")
        )
        return self._loader(data, batches, "val", len(indices), persistent=True)

    def loader(
        self,
        split: str | Source,
        geometry: str | Geometry = "eval",
        order: str = "sequential",
        limit: int | None = None,
        repeat: bool = False,
        purpose: str = "offline",
        batch_size: int | None = None,
    ) -> CheckedLoader:
        """A deterministic pass over a split for work outside training (k-means, pools, prediction): no views, no flips.

        split: "train", "val" or any Source. geometry: "train" (random crops keyed by `purpose`), "eval" or a Geometry.
        order: "sequential" or "shuffled" (keyed by seed and purpose). limit: at most so many pictures over all ranks;
        with `repeat` the pass starts over until the limit is reached (each round shuffled anew). batch_size: pictures
        over all ranks; default data.batch_size for "train", data.eval_batch_size otherwise.

        Several ranks: rank r takes the r-th contiguous part of the whole pass (parts differ by one picture at most), so
        `distributed.gather_uneven` of what a rank collected, called once at the end, restores the order of one process.
        Ranks may have different numbers of batches: no collective inside the loop.
        Unreadable pictures are replaced by others with the geometry "train" (the number stays), else left out.
        """
        if geometry not in ("train", "eval") and not isinstance(geometry, Geometry):
            raise ValueError(f"geometry={geometry!r}: 'train', 'eval' or a Geometry")
        training = geometry == "train"
        chosen = geometry if isinstance(geometry, Geometry) else self.train_geometry if training else self.eval_geometry
        store = self._decoded(split, chosen, make=False) if isinstance(split, str) else None
        data = self.dataset(split, chosen, purpose, replace=training, store=store)
        keys = sampling.pass_keys(len(data), order, limit, repeat, self.seed, purpose)
        rank, world = distributed.rank(), distributed.world_size()
        key = "batch_size" if training else "eval_batch_size"
        total = int(self.data[key]) if batch_size is None else batch_size
        part = sampling.contiguous(keys, rank, world)
        batches = sampling.FixedBatches(part, self._share(total, f"data.{key}"))
        return self._loader(data, batches, split if isinstance(split, str) else None, len(part), persistent=False)

    def batches(self, split: str, geometry: Geometry, batches: Any, purpose: str, pseudo: Any = None) -> CheckedLoader:
        """Given batches of keys (pass, index) of a split, on this rank alone, and never a label: for offline stages.

        batches: a list of lists of keys, or a batch sampler. geometry, pseudo: see `dataset`; a picture that cannot be
        read is left out.
        """
        source = self.source(split)
        data = PictureDataset(source, geometry, False, self.seed, purpose, flip=geometry.flip_p > 0, pseudo=pseudo)
        return self._loader(data, batches, split, len(batches) * int(self.data.batch_size), persistent=False)

    def in_step(
        self,
        split: str,
        geometry: Geometry,
        keys: Sequence[sampling.Key],
        batch_size: int,
        purpose: str = "train",
    ) -> Iterator[dict[str, Any]]:
        """Pictures of a split by their keys (pass, index), in global batches of `batch_size` that the ranks share in
        contiguous parts: all ranks get the same number of batches, so collectives may stand in the loop.

        purpose: keys the random crops; with "train" a key shows what training shows in that pass. No labels, no views.
        A last batch of fewer pictures than ranks is left out. A picture that cannot be read is replaced by another.
        """
        rank, world = distributed.rank(), distributed.world_size()
        whole = [keys[first : first + batch_size] for first in range(0, len(keys), batch_size)]
        parts = [list(sampling.contiguous(part, rank, world)) for part in whole if len(part) >= world]
        data = PictureDataset(
            self.source(split), geometry, False, self.seed, purpose, replace_broken=True, flip=geometry.flip_p > 0,
            store=self._decoded(split, geometry, make=False),
        )  # fmt: skip
        return iter(self._loader(data, parts, split, len(keys) // world, persistent=False))

    def shown(
        self,
        step: int,
        wanted: Sequence[str],
        batch_size: int,
        purpose: str,
        device: torch.device,
        most: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The training pictures, at most so many, as the epoch of `step` shows them in the views `wanted` (`of_epoch`),
        in an order keyed by `purpose` and the epoch; on the device, `in_step`, without labels."""
        epoch, number = self.epoch_of(step), step // self.steps_per_epoch
        order = sampling.permutation(self.train_items, self.seed, f"{purpose}.order", epoch.number)[:most]
        specs, needed = {}, set(wanted)
        for name, spec in reversed(self.views.items()):
            if name in needed:
                specs[name] = spec
                needed.add(spec.source)
        specs = dict(reversed(specs.items()))
        keys = [(number, int(index)) for index in order]
        for batch in self.in_step("train", self.train_geometry, keys, batch_size):
            found = {key: batch[key].to(device, non_blocking=True) for key in ("image", "valid", "index")}
            yield views.make_views(found, specs, self.seed, step, epoch)

    def _share(self, batch_size: int, key: str) -> int:
        """Pictures of a rank's batch where the split into batches changes no result: rounded up."""
        if batch_size < 1:
            raise ConfigError(f"{key}={batch_size}: must be 1 or more pictures")
        return -(-batch_size // distributed.world_size())

    @property
    def _processes_here(self) -> int:
        """Training processes on this machine, which share its cores."""
        return self.trainer.num_devices if self.trainer is not None and distributed.active() else 1

    def _cache(self, items: int) -> float:
        """Megabytes for each reading process of a loader."""
        return float(self.data.get("cache_mb") or 0) / max(1, self._workers(items))

    def _workers(self, items: int) -> int:
        return sampling.worker_count(int(self.data.workers), items, self._processes_here)

    def _loader(
        self, data: PictureDataset, batches: Any, split: str | None, items: int, persistent: bool
    ) -> CheckedLoader:
        broken = self.broken[split] if split else BrokenFiles("given", 1.0, len(data.source))
        workers = self._workers(items)
        return CheckedLoader(
            data,
            broken,
            self.foreign[split] if split else ForeignIds("given"),
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=Collate(self.pad_multiple, data.instances),
            pin_memory=torch.cuda.is_available(),
            persistent_workers=persistent and workers > 0,
        )

    # ---- on the device ----

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Makes the views of a training batch on its device (`views.make_views`), without gradient."""
        if self.trainer is None or not self.trainer.training or not self.views:
            return batch
        step = self.trainer.global_step
        return views.make_views(batch, self.views, self.seed, step, self.epoch_of(step))

    def epoch_of(self, step: int) -> views.Epoch:
        """What the draws of views `of_epoch` belong to at a step."""
        return views.Epoch(step // (self.view_steps or self.steps_per_epoch), self.train_items)

    def sync_broken(self) -> None:
        """Puts the unreadable files and foreign label values of all ranks together; raises DataError on every rank when
        there are too many unreadable ones.

        A collective: all ranks call it at the same place (the end of validation). In between every rank counts its own.
        """
        for foreign in self.foreign.values():
            foreign.sync()
        for broken in self.broken.values():
            broken.sync()


def load_datamodule(name: str) -> type[SegmentationDataModule]:
    """The class of a data set by its name (`datamodules/<name>.py` with `configs/data/<name>.yaml`).

    Raises ConfigError for a name without these files.
    """
    if name not in available():
        raise ConfigError(f"data={name}: there is no data set of this name; {did_you_mean(name, available())}")
    module = importlib.import_module(about.module_of("datamodules", name))
    found = [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if issubclass(member, SegmentationDataModule) and member.__module__ == module.__name__
    ]
    if len(found) != 1:
        raise ConfigError(f"data={name}: datamodules/{name}.py must define one data module class, not {len(found)}")
    return found[0]
