"""Methods that compute labels offline before they train: the base that gives the steps and takes what they found."""

import logging
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from lightning_modules.base.segmenter import UnsupervisedSegmenter
from models.backbone import Backbone
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import View

if TYPE_CHECKING:
    from datamodules.base import SegmentationDataModule

log = logging.getLogger(__name__)


class StagedSegmenter(UnsupervisedSegmenter):
    """A method with an offline stage: see `pseudo_labels/__init__.py`; `method.stage.*` are its keys.

    Class facts: `stage_in_training` (False: training reads nothing of the stage, so `run.py pseudo` alone runs it).
    """

    stage_in_training = True
    stage_files = "pseudo_labels"
    """Name of its panel and its summary in a run folder; each phase with a stage of its own has another."""

    def enter(self, checkpoint: dict[str, Any]) -> None:
        """Before the stage of a later phase: the checkpoint that the run goes on from, the last one of the phase before
        or one from inside this phase. For a stage that looks with what the run has learnt."""

    def steps(self, data: "SegmentationDataModule") -> list[Step]:
        """The steps in the order in which they run."""
        raise TypeError(f"{type(self).__name__} has to define steps()")

    def staged(self, results: Results, data: "SegmentationDataModule") -> None:
        """Before training, at every start: keep tables in buffers, give the data a view (`data.pseudo`)."""

    def shown(self, results: Results) -> dict[str, View]:
        """Maps for the panel of the stage, by the heading of their column."""
        return {}

    stage_name: str | None = None
    """Fingerprints of the steps that this training goes by; the checkpoint names them."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["labelfree"]["stage"] = self.stage_name

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        found = checkpoint["labelfree"].get("stage")
        if self.stage_name is None:  # evaluation and prediction go by the weights alone
            self.stage_name = found
        elif found is not None and found != self.stage_name:
            log.warning(
                "The offline stage was %s when this run was stopped and is %s now (other pictures, backbone weights or "
                "settings): the run goes on with other pseudo-labels than it would have seen",
                found,
                self.stage_name,
            )


def check_stage(settings: Any, backbone: Backbone | None = None) -> None:
    """Raises ConfigError for values of `method.stage` that no stage can run with.

    backbone: where pictures of `size` px go through it as a whole, so that they have to be whole patches.
    """
    for name in ("batch_size", "shard"):
        if settings[name] < 1:
            raise ConfigError(f"method.stage.{name}={settings[name]}: must be at least 1")
    if settings.shard % settings.batch_size:
        raise ConfigError(
            f"method.stage.shard={settings.shard}: must be a multiple of method.stage.batch_size="
            f"{settings.batch_size}, so that no batch lies in two files"
        )
    sides = [] if settings.size is None else [settings.size] if isinstance(settings.size, int) else settings.size
    if sides and (min(sides) < 1 or len(sides) > 2):
        raise ConfigError(f"method.stage.size={settings.size}: must be at least 1 px, or null for the files' own size")
    if backbone is not None:
        backbone.check_size(settings.size, "method.stage.size")
