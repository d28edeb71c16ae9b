"""Map and reduce steps of an offline stage inside a Trainer: who does which shard, who writes, what ranks agree on."""

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from safetensors.torch import save
from torch import Tensor

from common import distributed
from common.errors import ConfigError, DataError, LabelfreeError
from common.files import size_text
from datamodules.base.transforms import NATIVE
from engine.stages.plan import Plan
from pseudo_labels import cache
from pseudo_labels.cache import Place, Record
from pseudo_labels.steps import MapStep, ReduceStep, Results

log = logging.getLogger(__name__)

SAMPLED = 64
"""Pictures whose sizes are looked at, about, before a step of pictures of their own size."""


class MapRunner(L.LightningModule):
    """One map step as a LightningModule: labels are taken out, errors wait for the other ranks."""

    def __init__(self, step: MapStep, results: Results) -> None:
        super().__init__()
        self.step, self.results = step, results
        self.error: Exception | None = None

    def on_predict_start(self) -> None:
        self._guarded(lambda: self.step.begin(self.results))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Record]:
        if self.error is not None:
            return []
        # Lightning predicts in inference mode, whose tensors take part in no gradient.
        with torch.inference_mode(False), torch.set_grad_enabled(self.step.gradients):
            batch = {key: value.clone() if isinstance(value, Tensor) else value for key, value in batch.items()}
            return self._guarded(lambda: self.step.records(batch)) or []

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:
            if not distributed.active():
                raise
            self.error = error  # raised on all ranks when they meet
        return None


class MapData(L.LightningDataModule):
    """The pictures of the shards that are missing, whole shards on each rank; asks the disk before it begins."""

    def __init__(self, stage: Plan, step: MapStep, place: Place) -> None:
        super().__init__()
        self.allow_zero_length_dataloader_with_multiple_devices = True  # fewer shards may be missing than ranks
        self.stage, self.step, self.place = stage, step, place
        self.pictures = len(stage.data.source(step.split))
        self.shard = int(stage.settings.shard)
        self.chosen = frozenset(step.pictures(self.pictures))
        self.error: Exception | None = None
        self.own: list[int] = []
        self.todo = 0

    def predict_dataloader(self) -> Any:
        """Made when the processes know each other. Raises ConfigError, on all of them, where it cannot start."""
        missing = agreed(self._begin)
        self.own = []
        for number in missing[distributed.rank() :: distributed.world_size()]:
            if self.chosen.isdisjoint(self.indices(number)):
                self.write(number, {})  # no batch will come for it
            else:
                self.own.append(number)
        size = self.stage.batch(self.step)
        self.todo = len([index for number in missing for index in self.indices(number) if index in self.chosen])
        batches = []
        for number in self.own:
            keys = [(0, index) for index in self.indices(number) if index in self.chosen]
            batches += [keys[first : first + size] for first in range(0, len(keys), size)]
        split, geometry = self.step.split, self.step.geometry()
        return AsItIs(self.stage.data.batches(split, geometry, batches, f"stage.{self.step.name}"), self)

    def indices(self, shard: int) -> range:
        return range(shard * self.shard, min((shard + 1) * self.shard, self.pictures))

    def write(self, number: int, found: dict[int, Record]) -> None:
        """Write a shard, and take its records out of `found`, by index; those that are not there were not seen."""
        records = [found.pop(index, None) or self._absent(index) for index in self.indices(number)]
        try:
            cache.write_shard(self.place.shard(number), records)
        except (OSError, LabelfreeError) as error:
            if not distributed.active():
                raise
            self.error = error

    def _absent(self, index: int) -> Record:
        reason = cache.UNREADABLE if index in self.chosen else "not_chosen"
        return Record(index, self.stage.data.source(self.step.split).id(index), (0, 0), (0, 0), drop=reason)

    def _begin(self) -> list[int]:
        """Numbers of the missing shards, after everything that can be wrong was looked at; on rank 0."""
        step, place = self.step, self.place
        try:
            (place.path / "shards").mkdir(parents=True, exist_ok=True)
            cache.clear(place)
            free = shutil.disk_usage(place.path).free
        except OSError as error:
            raise ConfigError(
                f"cache.dir={place.root}: cannot be written to ({error.strerror}); name another folder"
            ) from None
        missing = place.missing(self.pictures, self.shard)
        count = len([index for number in missing for index in self.indices(number) if index in self.chosen])
        if step.geometry().crop == NATIVE:
            step.sides = mean_sides(self.stage.data.source(step.split)) or step.sides
        needed = count * step.record_bytes()
        if needed > free:
            raise ConfigError(
                f"cache.dir={place.root}: the records of {count} pictures (step {step.name}) need about "
                f"{size_text(needed)}, but it has {size_text(free)} free; set cache.dir to a larger disk"
            )
        done = "" if count == len(self.chosen) else f", {len(self.chosen) - count} are there already"
        log.info(
            "pseudo-labels: %s of %d pictures%s into %s, at most about %s (%s free)",
            step.name, count, done, place.path, size_text(needed), size_text(free),
        )  # fmt: skip
        line = step.announce(count)
        if line:
            log.info("pseudo-labels: %s: %s", step.name, line)
        return missing


def mean_sides(source: Any) -> tuple[float, float] | None:
    """Mean height and width, px, of some pictures of a source, the product being their mean area; None where it does
    not know sizes."""
    if not hasattr(source, "size"):
        return None
    sizes = []
    for index in range(0, len(source), max(1, len(source) // SAMPLED)):
        with contextlib.suppress(DataError):  # the step itself says what cannot be read
            sizes.append(source.size(index))
    if not sizes:
        return None
    height = sum(size[0] for size in sizes) / len(sizes)
    return height, sum(size[0] * size[1] for size in sizes) / len(sizes) / height


class AsItIs:
    """A loader that Lightning takes as any iterable: it would make a DataLoader anew to watch its sampler.

    An error ends it early and waits in `data.error` for the other ranks.
    """

    def __init__(self, loader: Any, data: MapData) -> None:
        self.loader, self.data = loader, data

    def __iter__(self) -> Iterator[dict[str, Any]]:
        try:
            yield from self.loader
        except Exception as error:
            if not distributed.active():
                raise
            self.data.error = error

    def __len__(self) -> int:
        return len(self.loader)


class ShardWriter(BasePredictionWriter):
    """Writes a shard when all its pictures have come by; one that did not come could not be read."""

    def __init__(self, data: MapData) -> None:
        super().__init__("batch")
        self.data = data
        self.waiting: dict[int, Record] = {}
        self.left: list[int] = []

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.left = list(self.data.own)

    def write_on_batch_end(self, trainer: L.Trainer, pl_module: MapRunner, prediction: list[Record], *_: Any) -> None:
        if self.data.error is not None or pl_module.error is not None:
            return
        for record in prediction:
            self.waiting[record.index] = record
        current = max((record.index // self.data.shard for record in prediction), default=-1)
        while self.left and self.left[0] < current:
            self.data.write(self.left.pop(0), self.waiting)

    def on_predict_end(self, trainer: L.Trainer, pl_module: MapRunner) -> None:
        while self.left and self.data.error is None and pl_module.error is None:
            self.data.write(self.left.pop(0), self.waiting)


class OneBatch(L.LightningDataModule):
    """A batch for each rank, so that a reduce step runs where Trainer puts it, with all processes there."""

    error: Exception | None = None

    def predict_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([0])


class ReduceRunner(L.LightningModule):
    """One reduce step: rank 0 computes and writes, the others wait."""

    def __init__(self, step: ReduceStep, results: Results, place: Place) -> None:
        super().__init__()
        self.step, self.results, self.place = step, results, place
        self.register_buffer("anchor", torch.zeros(()))  # a module without a parameter has no device
        self.error: Exception | None = None

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if distributed.rank() == 0:
            self._compute()
        return batch

    def _compute(self) -> None:
        try:
            cache.clear(self.place)
            with torch.inference_mode(False), torch.no_grad():
                found = self.step.table(self.results, self.anchor.device)
            arrays = {
                name: v.detach().cpu() if isinstance(v, Tensor) else torch.from_numpy(v) for name, v in found.items()
            }
            shapes = {name: list(value.shape) for name, value in sorted(arrays.items())}
            self.place.finish({"arrays": shapes}, table=safetensors_bytes(arrays))
        except Exception as error:
            if not distributed.active():
                raise
            self.error = error


class Meeting(L.LightningModule):
    """Predicts nothing: it is run so that Trainer brings the processes of a run together."""

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return batch


def agreed(work: Callable[[], Any]) -> Any:
    """What `work` gives on rank 0, on every rank; its LabelfreeError is raised on all of them."""
    found: list[Any] = [None]
    if distributed.rank() == 0:
        try:
            found = [work()]
        except LabelfreeError as error:
            found = [error]
    found = everywhere(found[0])
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def everywhere(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    return distributed.objects(value)


def share(error: Exception | None, device: torch.device) -> None:
    """Raises an error of any rank on all of them."""
    somewhere = distributed.anywhere(error is not None, device)
    if error is not None:
        raise error
    if somewhere:
        raise DataError("the offline stage: another process could not do its part; its own line says why")


def safetensors_bytes(tensors: dict[str, Tensor]) -> bytes:
    return save({name: value.contiguous() for name, value in tensors.items()})
