"""A method at a setting, built as a run builds it and trained for some steps: what a step costs, and what the backbone.

The floor of a step is the passes of the backbone in it, gradients included where it is trained. What is beside them is
split by who spends it. Methods with an offline stage have a second unit of work: a picture of that stage.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from omegaconf import DictConfig

import config
from benchmarks.harness import peak_memory, start_memory
from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from engine import setup
from engine.stages.stage import Stage, prepare
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.staged import StagedSegmenter
from models.backbone import Backbone, Features

WARM = 1
"""Steps before those that count."""
CLASSES, THINGS = 27, 12
"""Of made pictures, as COCO-Stuff-27 has them."""
BLOCK = 16
"""Pixels of a side of the even squares that made pictures consist of."""

ALWAYS = (
    "data.workers=0", "trainer.progress=none", "evaluation.panels=0", "trainer.val_every=1000000",
    "trainer.max_epochs=null",
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A method, what its setting is called, the words that make it, and what was cut off the published one."""

    method: str
    name: str
    words: tuple[str, ...]
    cut: str = ""
    made: tuple[int, tuple[int, int]] | None = None
    """Pictures, and height and width of their files, px, in the place of a data set; None: the data set is used."""


@dataclass(frozen=True)
class Cost:
    """What a unit of work takes: seconds (CPU time, or time on the GPU), and MiB."""

    unit: str
    seconds: float
    backbone: float
    """Of `seconds`, the passes of the backbone and, where it is trained, their gradients."""
    data: float | None
    """Beside `seconds`: reading, cropping and colouring of a step's pictures; None where it cannot be told apart."""
    parts: dict[str, float]
    """`seconds` less `backbone`, by who spends them."""
    mib: float
    losses: tuple[float, ...] = ()

    @property
    def times(self) -> float:
        """How many times its floor the unit takes."""
        return self.seconds / self.backbone if self.backbone else float("inf")


# ---------------------------------------------------------------- settings


def recipe(method: str) -> str | None:
    """The recipe that stands for a method: of those with a published figure ViT-S/8 first, then COCO-Stuff-27."""
    found = []
    for name in config.names("experiment"):
        tree = config.load_group("experiment", name)
        words = tree["words"]
        if words["method"] == method and tree["figure"]["source"] != "-":
            found.append((not words["backbone"].startswith("dino_vits8"), words["data"] != "cocostuff27", name))
    return min(found)[-1] if found else None


def known_words(words: list[str], wanted: dict[str, Any]) -> list[str]:
    """Those of the keys that a configuration has, as words."""
    known = config.flatten(config.compose(words))
    return [f"{key}={value}" for key, value in wanted.items() if key in known]


class MadePictures:
    """`count` pictures of even squares and noise, each a function of its index; labels are those of the squares."""

    def __init__(self, split: str, count: int, size: tuple[int, int]) -> None:
        self.split, self.count, self.shape = split, count, size

    def __len__(self) -> int:
        return self.count

    def id(self, index: int) -> str:
        return f"{self.split}/{index:06d}"

    def fingerprint(self) -> str:
        return f"made/{self.split}/{self.count}/{self.shape}"

    def size(self, index: int) -> tuple[int, int]:
        return self.shape

    def read(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.default_rng([self.split == "val", index])
        height, width = self.shape
        grid = draw.integers(0, CLASSES, (-(-height // BLOCK), -(-width // BLOCK)))
        label = np.repeat(np.repeat(grid, BLOCK, 0), BLOCK, 1)[:height, :width]
        colours = draw.integers(0, 240, (CLASSES, 3))
        image = colours[label] + draw.integers(0, 16, (height, width, 3))
        return image.astype(np.uint8), label.astype(np.uint8)


class MadeData(SegmentationDataModule):
    """Made pictures under the keys of any data set: its crops, sizes and views, and no file."""

    def __init__(self, cfg: DictConfig, count: int, size: tuple[int, int]) -> None:
        super().__init__(cfg)
        self.count, self.size = count, size

    def build_source(self, split: str) -> MadePictures:
        return MadePictures(split, self.count if split == "train" else 1, self.size)

    def build_meta(self) -> ClassMeta:
        names = tuple(f"class {number}" for number in range(CLASSES))
        return ClassMeta(names, default_palette(CLASSES), things=tuple(range(THINGS)))


@dataclass
class Built:
    """A method, connected to its data."""

    cfg: DictConfig
    data: SegmentationDataModule
    model: UnsupervisedSegmenter
    folder: Path


def build(setting: Setting, folder: Path, made: type[MadeData], *more: str) -> Built:
    """The method of a setting; files of it go below `folder`."""
    places = (f"cache.dir={folder / 'cache'}", f"run.dir={folder}")
    cfg = config.compose([*setting.words, *ALWAYS, *places, *more])
    if setting.made is None:
        cfg, data = setup.build_data(cfg)
    else:
        data = made(cfg, *setting.made)
        data.setup()
        if cfg.method.num_clusters is None:
            cfg = config.changed(cfg, {"method.num_clusters": CLASSES})
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    return Built(cfg, data, model, folder)


# ---------------------------------------------------------------- timing


class Timer:
    """Nested spans of time; a name's own time is that of its spans less that of the spans inside of them.

    On a CPU marks are CPU time of the process, on a GPU events of its stream, which wait for nothing.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.gpu = torch.device(device).type == "cuda"
        self.open: list[tuple[str, Any]] = []
        self.spans: list[tuple[str, str, Any, Any]] = []

    def mark(self) -> Any:
        if not self.gpu:
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name: str) -> None:
        self.open.append((name, self.mark()))

    def end(self, name: str) -> None:
        """End the innermost span, where it has this name."""
        if self.open and self.open[-1][0] == name:
            _, first = self.open.pop()
            self.spans.append((name, self.open[-1][0] if self.open else "", first, self.mark()))

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.begin(name)
        try:
            yield
        finally:
            self.end(name)

    def around(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same work, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return work(*args, **kwargs)

        return timed

    def take(self) -> dict[str, float]:
        """Own seconds of every name since the last call."""
        if self.gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for name, parent, first, last in self.spans:
            spent = first.elapsed_time(last) / 1000 if self.gpu else last - first
            found[name] = found.get(name, 0.0) + spent
            if parent:
                found[parent] = found.get(parent, 0.0) - spent
        self.spans = []
        return found


@contextmanager
def passes(timer: Timer) -> Iterator[None]:
    """Times every pass of every backbone as `backbone`, and what follows the first gradient that reaches its features
    as `backbone gradient`: a backward pass goes through the backbone last."""
    plain = Backbone.features

    def arrived(_: torch.Tensor) -> None:
        if timer.open and timer.open[-1][0] == "backward":
            timer.begin("backbone gradient")

    def features(self: Backbone, *args: Any, **kwargs: Any) -> Features:
        with timer.span("backbone"):
            made = plain(self, *args, **kwargs)
        for output in (*made.levels, made.cls):
            if output is not None and output.requires_grad:
                output.register_hook(arrived)
        return made

    Backbone.features = features
    try:
        yield
    finally:
        Backbone.features = plain


class Watch(L.Callback):
    """Times the parts of every training step: `data` before it, then `loss`, `backward`, `optimiser`, and `probes`,
    which stands for the rest: probes, logging, and what a method does before or behind its step."""

    def __init__(self, timer: Timer, begin: Callable[[], None], last: AbstractContextManager[None]) -> None:
        self.timer, self.begin, self.last = timer, begin, last
        self.steps: list[dict[str, float]] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.timer.take()
        self.timer.begin("data")

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.timer.end("data")
        if trainer.global_step == WARM:
            self.begin()
        if trainer.global_step == trainer.max_steps - 1:
            self.last.__enter__()
        self.timer.begin("probes")

    def on_before_backward(self, *_: Any) -> None:
        self.timer.begin("backward")

    def on_after_backward(self, *_: Any) -> None:
        self.timer.end("backbone gradient")
        self.timer.end("backward")
        self.timer.begin("optimiser")

    def on_train_batch_end(self, trainer: L.Trainer, model: Any, outputs: Any, *_: Any) -> None:
        self.timer.end("optimiser")
        self.timer.end("probes")
        if trainer.global_step == trainer.max_steps:
            self.last.__exit__(None, None, None)
        self.steps.append(self.timer.take())
        self.losses.append(float(outputs["loss"]))
        self.timer.take()
        self.timer.begin("data")


def step_cost(
    built: Built, steps: int, before: int, last: Callable[[], AbstractContextManager[None]] | None = None
) -> Cost:
    """The median of some training steps behind a first one. `before`: bytes that were in use before it was built.

    `last`: what one more step, which does not count, runs inside of.
    """
    model = built.model
    torch.manual_seed(0)  # dropout inside a library's layers: the same numbers each time
    total = WARM + steps + (last is not None)
    trainer = setup.build_trainer(built.cfg, total, [], [], built.folder)
    timer = Timer(trainer.strategy.root_device)
    watch = Watch(timer, lambda: start_memory(timer.gpu), nullcontext() if last is None else last())
    trainer.callbacks.append(watch)
    model.loss = timer.around("loss", model.loss)
    try:
        with passes(timer):
            trainer.fit(model, built.data)
    finally:
        del model.loss
    counted = watch.steps[WARM : WARM + steps]
    names = {name for step in counted for name in step}
    parts = {name: statistics.median(step.get(name, 0.0) for step in counted) for name in names}
    backbone = parts.pop("backbone", 0.0) + parts.pop("backbone gradient", 0.0)
    data = parts.pop("data", 0.0)
    pictures = int(built.cfg.data.batch_size)
    unit = f"step of {pictures} {'pictures' if pictures > 1 else 'picture'}"
    mib = (peak_memory(timer.gpu) - before) / 2**20
    return Cost(unit, backbone + sum(parts.values()), backbone, data, parts, mib, tuple(watch.losses))


def stage_cost(built: Built, before: int) -> Cost:
    """A picture of the offline stage: the mean over the training pictures, by step of the stage."""
    stage = Stage(built.cfg, built.data, built.model)
    timer = Timer(setup.device(built.cfg))
    for name, step in stage.steps.items():
        for work in ("records", "table"):
            if hasattr(step, work):
                setattr(step, work, timer.around(name, getattr(step, work)))
    with passes(timer), timer.span("reading and writing"):
        prepare(stage, 0)
    pictures = len(built.data.source("train"))
    parts = {name: seconds / pictures for name, seconds in timer.take().items()}
    mib = (peak_memory(timer.gpu) - before) / 2**20
    backbone = parts.pop("backbone", 0.0)
    return Cost("picture of the stage", backbone + sum(parts.values()), backbone, None, parts, mib)


def costs(
    setting: Setting,
    folder: Path,
    steps: int,
    made: type[MadeData] = MadeData,
    last: Callable[[], AbstractContextManager[None]] | None = None,
) -> list[Cost]:
    """A picture of the stage, where there is one, and a training step, where the method trains or has no stage.

    `made`: makes the pictures of a setting that names no data set. `last`: see `step_cost`.
    """
    gpu = torch.cuda.is_available() and config.compose(setting.words).trainer.accelerator != "cpu"
    before = start_memory(gpu)
    built = build(setting, folder, made, f"trainer.max_steps={WARM + steps + 1}")
    found = []
    if isinstance(built.model, StagedSegmenter):
        found.append(stage_cost(built, before))
    if built.model.trains or not found:
        found.append(step_cost(built, steps, before, last))
    return found
