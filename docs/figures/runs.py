"""The small runs that figures are of: trained once, kept in runs/figures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import config
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.base.dataset import Collate
from datamodules.base.views import make_views
from engine import setup, training
from engine.stages.stage import Stage
from lightning_modules.base import UnsupervisedSegmenter
from pseudo_labels.steps import Results

FOLDER = Path("runs") / "figures"
WORDS = [
    "data=scenes", "data.val_count=12", "data.workers=0", "trainer.max_steps=200", "trainer.val_every=1000",
    "trainer.progress=none", "evaluation.panels=0", "evaluation.kmeans.restarts=1", "evaluation.kmeans.pictures=200",
    f"run.dir={FOLDER}",
]  # fmt: skip
"""The method's own settings on the scenes; evaluated on a few of them, because no score is read."""


@dataclass(frozen=True)
class Seen:
    """A method with its data, in evaluation mode."""

    cfg: DictConfig
    data: SegmentationDataModule
    model: UnsupervisedSegmenter
    checkpoint: dict[str, Any]
    """Empty where nothing was trained."""

    @property
    def meta(self) -> ClassMeta:
        return self.data.meta

    def batch(self, split: str, chosen: list[int]) -> dict[str, Any]:
        """Some pictures of a split, as evaluation sees them."""
        return self._collated(split, chosen, self.data.eval_geometry)

    def views(self, chosen: list[int]) -> dict[str, Any]:
        """Some training pictures with the views that the method trains on at step 0."""
        batch = self._collated("train", chosen, self.data.train_geometry)
        return make_views(batch, self.model.views, self.data.seed, 0, self.data.epoch_of(0))

    def _collated(self, split: str, chosen: list[int], geometry: Any) -> dict[str, Any]:
        maps = {"regions": self.data.regions, "pseudo": self.data.pseudo} if split == "train" else {}
        data = self.data.dataset(split, geometry, "figures", **maps)
        return Collate(self.model.pad_multiple)([data[index] for index in chosen])


def trained(method: str, *more: str, name: str | None = None) -> Seen:
    """The method after a short training; `more`: words that are other than in `WORDS`."""
    name = name or method
    training.train(config.compose([*WORDS, f"method={method}", f"run.name={name}", *more]))
    checkpoint = setup.read_checkpoint(FOLDER / name / "checkpoints" / "last.ckpt")
    cfg, data = setup.build_data(config.restore(checkpoint["labelfree"]["config"]))
    model = setup.restore_model(checkpoint, cfg, data.meta)
    setup.connect(model, data)
    return Seen(cfg, data, model, checkpoint)


def untrained(method: str, *more: str) -> Seen:
    """The method before its first step, on its backbone's own weights."""
    setup.begin()
    cfg, data = setup.build_data(config.compose([*WORDS, f"method={method}", *more]))
    model = setup.build_model(cfg, data.meta).eval()
    setup.connect(model, data)
    return Seen(cfg, data, model, {})


def staged(seen: Seen) -> Results:
    """What the offline stage of a method found, which it takes over."""
    results = Stage(seen.cfg, seen.data, seen.model).run()
    seen.model.staged(results, seen.data)
    return results
