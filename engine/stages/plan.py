"""What an offline stage consists of: its steps, where each is kept, and what its result depends on."""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from common.files import cache_folder
from common.precision import usable
from datamodules.base import SegmentationDataModule
from datamodules.base.transforms import NATIVE
from lightning_modules.base.staged import StagedSegmenter, check_stage
from pseudo_labels.cache import Place
from pseudo_labels.steps import MapStep, ReduceStep, Step


@dataclass
class Plan:
    """The steps of a method on its data, and where each of them is kept."""

    cfg: DictConfig
    data: SegmentationDataModule
    model: StagedSegmenter

    def __post_init__(self) -> None:
        self.settings = self.cfg.method.stage
        check_stage(self.settings)
        self.steps = {step.name: step for step in self.model.steps(self.data)}
        self.root = cache_folder(self.cfg) / "pseudo" / f"{self.cfg.method.name}-{self.cfg.data.name}"
        self.places: dict[str, Place] = {}
        for name, step in self.steps.items():
            unknown = [need for need in step.needs if need not in self.places]
            if unknown:
                raise ValueError(f"step '{name}' needs '{unknown[0]}', which does not stand before it")
            self.places[name] = Place(self.root, name, self._facts(step))

    @property
    def name(self) -> str:
        """Fingerprints of all steps, for checkpoints."""
        return " ".join(place.path.name for place in self.places.values())

    def _facts(self, step: Step) -> dict[str, Any]:
        """Everything that the result of a step depends on."""
        facts = step.identity() | {"needs": {need: self.places[need].fingerprint for need in step.needs}}
        facts["torch"] = torch.__version__
        if isinstance(step, ReduceStep):
            return facts
        accelerator = "gpu" if torch.cuda.is_available() and self.cfg.trainer.accelerator != "cpu" else "cpu"
        split = step.split if isinstance(step, MapStep) else "train"
        facts |= {
            "pictures": self.data.fingerprint(split, step.geometry()),
            "precision": usable(self.cfg.trainer.precision, accelerator),
        }
        if isinstance(step, MapStep):
            backbone = step.backbone.features_key if step.backbone is not None else None
            return facts | {"backbone": backbone, "shard": self.settings.shard, "batch": self.batch(step)}
        return facts | {"steps": step.steps, "batch": step.batch_size, "seed": int(self.cfg.seed)}

    def batch(self, step: MapStep) -> int:
        """Pictures of one pass: those with a shape of their own come one at a time."""
        crop = step.geometry().crop
        if crop not in ("none", "keep", NATIVE):
            raise ValueError(f"step '{step.name}': crop {crop}; a record is of a whole picture (none, keep, native)")
        return self.settings.batch_size if crop == "none" else 1
