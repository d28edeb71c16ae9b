"""Which checkpoint of a run is its best: rules by name, and what metrics.json says about the choice."""

from collections.abc import Mapping
from dataclasses import dataclass

from omegaconf import DictConfig

from common.errors import ConfigError
from lightning_modules.base import UnsupervisedSegmenter
from reporting.report import LAST_STEP

RULES = {
    "sum_of_four": ("val/cluster/miou", "val/cluster/acc", "val/linear/miou", "val/linear/acc"),
    "own_sum": ("val/own/miou", "val/own/acc"),
}
"""Named rules: the scores that are added up. `sum_of_four` is the choice of the released Hidden Positives, `own_sum`
(those of the method's own classifier) that of TransFGU."""
LABEL_FREE = ("val/cluster/entropy", "val/cluster/confidence")


@dataclass(frozen=True)
class Selection:
    """The highest sum of these scores is the best, of equals the later one; without scores the last step is."""

    keys: tuple[str, ...] = ()
    name: str = ""
    """Of a named rule."""

    def value(self, scores: Mapping[str, float]) -> float | None:
        """The sum that is compared; None where a score is missing."""
        if any(key not in scores for key in self.keys):
            return None
        return sum(scores[key] for key in self.keys)

    @property
    def rule(self) -> str:
        """The rule in words."""
        if not self.keys:
            return LAST_STEP
        return f"highest {self.name}{': ' if self.name else ''}{' + '.join(self.keys)}"

    @property
    def uses_labels(self) -> bool:
        return any(key not in LABEL_FREE for key in self.keys)


def choose(cfg: DictConfig, model: UnsupervisedSegmenter) -> Selection:
    """The rule of `evaluation.select`; `auto` is the headline's mIoU, and the last step without labels or where the
    method trains nothing.

    Raises ConfigError for a score that validation during training does not have (val/kmeans/* comes at the end).
    """
    wanted = cfg.evaluation.select
    probes = [probe for probe in model.probe_names() if probe != "kmeans"] if model.meta.has_labels else []
    known = [f"val/{probe}/{name}" for probe in probes for name in ("acc", "miou")] + list(LABEL_FREE)
    if wanted == "auto":
        headline = f"val/{model.headline}/miou"
        return Selection((headline,) if model.trains and headline in known else ())
    rules = [name for name, keys in RULES.items() if set(keys) <= set(known)]
    if wanted in rules:
        return Selection(RULES[wanted], wanted)
    if wanted in RULES and model.meta.has_labels:
        raise ConfigError(
            f"evaluation.select={wanted}: adds up {' and '.join(RULES[wanted])}, and method={cfg.method.name} has no "
            f"classifier of its own; use one of {', '.join(['auto', *rules, *known])}"
        )
    if wanted in RULES:
        raise ConfigError(
            f"evaluation.select={wanted}: adds up scores that need labels, and the data has none; "
            f"use auto (the last step) or one of {', '.join(known)}"
        )
    if wanted not in known:
        raise ConfigError(f"evaluation.select={wanted}: expected one of {', '.join(['auto', *rules, *known])}")
    return Selection((wanted,))
