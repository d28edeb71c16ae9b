"""Shared pieces of the tests: small runs in process, trained once a session where several tests look at the result."""

import json
import logging
import os
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import config
from engine import setup, training
from engine.records.run_names import NAME_VARIABLE
from lightning_modules import registry

METHODS = registry.names()

SMALL = [
    "data=scenes", "data.train_count=22", "data.val_count=5", "data.train_size=48", "data.eval_size=48",
    "data.batch_size=4", "data.eval_batch_size=4", "data.workers=0",
    "trainer=cpu", "trainer.max_steps=8", "trainer.val_every=4", "trainer.checkpoint_every=3", "trainer.log_every=1",
    "trainer.progress=none", "evaluation.panels=2", "evaluation.kmeans.restarts=1", "evaluation.kmeans.iterations=10",
]  # fmt: skip
"""A run of seconds that still has epochs (5 steps each), validations and checkpoints that fall on different steps."""

OF_SCENES = ("data=scenes", "data.train_count=", "data.val_count=")
"""Words of SMALL that other data sets do not know."""

SMALL_OF = {
    "method.pool.size": "32", "method.pool.renew_every": "3", "method.lambda_warmup": "2", "method.dim": "16",
    "method.head.hidden": "32", "method.head.bottleneck": "16", "method.head.out_dim": "48", "method.drop_path": "0",
    "method.crops.global_size": "32", "method.crops.local_size": "16", "method.crops.local_count": "2",
    "method.transformer.dropout": "0", "optim.grouping.lr": "1e-3",
    "method.stage.size": "48", "method.stage.batch_size": "2", "method.stage.shard": "6", "method.eigs.k": "5",
    "method.segments.count": "4", "method.segments.restarts": "1", "method.graph.neighbours": "6",
    "method.crops.max_per_image": "6", "method.crops.size": "32",
    "method.decoder.dim": "16", "method.decoder.heads": "2",
    "method.decoder.dropout": "0", "method.augment.size": "48", "method.restarts.epoch": "null",
    "method.objects.start": "2", "method.restarts.start": "1", "method.restarts.intervals": "[1]",
    "method.concepts": "24", "method.projection_dim": "32", "method.bank": "6",
    "method.start.steps": "3", "method.ema.every": "2",
    "method.kmeans.batch_size": "8", "method.kmeans.first": "2", "method.kmeans.counted": "12",
    "method.rounds.steps": "4", "method.detector.width": "16", "method.detector.hidden": "32",
    "method.detector.mask_width": "16", "method.detector.proposals": "32", "method.detector.test_proposals": "24",
    "method.detector.boxes": "16", "method.detector.anchors": "32", "method.detector.most": "5",
    "method.slot_dim": "16", "method.decoder.mlp.hidden": "[32, 32, 32]",
    "backbone.create.width": "4", "backbone.freeze_norms": "true", "backbone.cache_features": "false",
}  # fmt: skip
"""Keys made small where a method, or the backbone that it is at home with, has them. No features are kept: half
precision would show in the digits of `eval`. Drop path and dropout are off: a
library draws them. Batch norms are held: two processes on CPUs see half the batch each. At their own rate the
transformers of HSG make rounding grow: segments change groups after a few steps."""

SMALL_WORDS = {
    "segsort": ["backbone.frozen=false"],
    "hsg": ["backbone.frozen=false"],
    "slotcon": ["backbone.frozen=false", "method.head.norm=layer"],
}
"""Small runs that train the network, which the method's defaults leave alone, and have norms that hang on no batch."""


def small_words(method: str, *more: str) -> list[str]:
    """The words of a small run of a method; of scenes, unless `more` chooses a folder."""
    data = [word for word in SMALL if "data=folder" not in more or not word.startswith(OF_SCENES)]
    cfg = config.compose([f"method={method}"])
    known = config.flatten(cfg)
    words = [f"backbone={cfg.backbone.name}", *data, f"method={method}"]
    words += [f"{key}={value}" for key, value in SMALL_OF.items() if key in known]
    return [*words, *SMALL_WORDS.get(method, []), *more]


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its metrics.json, and its last checkpoint."""

    folder: Path
    metrics: dict[str, Any]

    @property
    def checkpoint(self) -> dict[str, Any]:
        return setup.read_checkpoint(self.folder / "checkpoints" / "last.ckpt")

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return self.checkpoint["state_dict"]


def run_small(method: str, parent: Path, name: str, *more: str) -> Run:
    """Train a small run in process."""
    words = small_words(method, f"run.dir={parent}", f"run.name={name}", *more)
    metrics = training.train(config.compose(words))
    return Run(parent / name, metrics)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """The plain small run of a method, trained once a session."""
    done: dict[str, Run] = {}

    def get(method: str) -> Run:
        if method not in done:
            done[method] = run_small(method, tmp_path_factory.mktemp("runs"), method)
        return done[method]

    return get


@pytest.hookimpl(trylast=True)  # what -m leaves out is gone
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long come first, so that none of them runs alone at the end: the other job fills up with short
    ones. The seconds are rough: of a test that starts processes, of one that trains, and of any other."""
    seconds: dict[Path, float] = {}
    for item in items:
        own = 10 if item.get_closest_marker("ddp") else 3 if item.get_closest_marker("train") else 0.1
        seconds[item.path] = seconds.get(item.path, 0) + own
    items.sort(key=lambda item: -seconds[item.path])


@pytest.hookimpl(tryfirst=True)  # ahead of the fixtures, which draw too
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test that draws draws the same every time, whatever ran before it in its process."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def own_run_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name made from the time belongs to one process; tests run several trainings in one."""
    monkeypatch.delenv(NAME_VARIABLE, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def no_handler_is_left() -> Iterator[None]:
    """A handler that a test leaves to the log writes to the test's standard error, which is closed by then: every later
    test finds an error of logging in its own."""
    root = logging.getLogger()
    before = [handler for handler in root.handlers if type(handler) is logging.StreamHandler]
    yield
    left = [handler for handler in root.handlers if type(handler) is logging.StreamHandler and handler not in before]
    for handler in left:
        root.removeHandler(handler)
    assert not left, "logging.basicConfig was reached with a root logger that this test had emptied; give it back"


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or leaves tables in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def pictures() -> Path:
    """The folder that holds camvid/, coco200/ and so on; named by LABELFREE_REALDATA."""
    path = Path(os.environ.get("LABELFREE_REALDATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "camvid").is_dir():
        pytest.skip(f"no camvid/ in {path}; LABELFREE_REALDATA names the folder of the pictures")
    return path


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
