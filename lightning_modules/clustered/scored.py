"""Scores of the classifiers that a method trains with, beside those of its final clusters."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from evaluation import readout
from evaluation.matching import Scores
from evaluation.metrics import SegmentationScore
from evaluation.readouts import Readout


class ClassifierScore(Readout):
    """Matches the classes of one classifier as those of any clusters are; `policy`: see `SegmentationScore`."""

    def __init__(self, name: str, view: int, clusters: int, classes: int, **policy: Any) -> None:
        super().__init__()
        self.name, self.view = name, view
        self.score = SegmentationScore(clusters, classes, **policy)

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        if "label" in batch:
            found = readout.predict(model.classifier_logits(codes, self.view), batch["image"].shape[-2:])
            self.score.update(found, batch["label"])
        return {}

    def compute(self) -> Scores:
        return self.score.compute()

    def reset(self) -> None:
        self.score.reset()

    def protocol(self) -> str:
        return f"the classifier of the last epoch, {self.score.policy['matching']} matching"
