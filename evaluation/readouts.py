"""Further evaluations beside the probes, as objects: a method names its own (`readouts`), the configuration others."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from evaluation.matching import Scores
from evaluation.metrics import SegmentationScore


class Readout(ABC, nn.Module):
    """One of them; what it finds is logged as `val/<name>/*`.

    Whatever it counts lies in torchmetrics that are its attributes, so it is on the device and summed over ranks.
    """

    name: str
    """Stands in keys of metrics.json."""
    ready = True
    """False: it is passed over (nothing to compare with yet)."""
    instances = False
    """True: it wants objects one by one in the batch, where the data has them."""
    groups: tuple[str, ...] = ()
    """Maps that `see` gives whose ids are groups of one picture, without a meaning beyond it."""

    @abstractmethod
    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        """Take a validation batch (`image`, `valid`, and `label` where there are any) with its codes [B,D,h,w].

        Returns id maps [B,H,W] by column of the panels.
        """

    @abstractmethod
    def compute(self) -> Scores | dict[str, float]:
        """What was found since `reset`, over all ranks: Scores, or values in percent by name."""

    def results(self) -> dict[str, Scores | dict[str, float]]:
        """The same by row of the tables: one named `name`, or several where a read-out says more. A collective."""
        return {self.name: self.compute()}

    @abstractmethod
    def reset(self) -> None:
        """Forget what was counted."""

    @abstractmethod
    def protocol(self) -> str:
        """How it reads, for metrics.json (`protocol/<name>`)."""

    def protocols(self) -> dict[str, str]:
        """The same by row of the tables."""
        return {self.name: self.protocol()}


class LabelledReadout(Readout):
    """One that learned classes from labels of training pictures: its id maps are scored as classes."""

    score: SegmentationScore

    @abstractmethod
    def classes_of(self, batch: Mapping[str, Any], codes: Tensor) -> Tensor:
        """The class of every pixel, [B,H,W], of a validation batch with codes [B,D,h,w]."""

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        found = self.classes_of(batch, codes)
        if "label" in batch:
            self.score.update(found, batch["label"])
        return {self.name: found}

    def compute(self) -> Scores:
        return self.score.compute()

    def reset(self) -> None:
        self.score.reset()
