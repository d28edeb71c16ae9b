"""metrics.json of a finished run, read without importing its method."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import config
from common.errors import ConfigError
from common.formats.tables import read_object
from lightning_modules.facts import facts

FACTS = {"method": str, "data": str, "backbone": str, "seed": int, "steps": int}
"""What metrics.json of a training says beside scores."""
REMEDY = "delete it, then the same training or evaluation writes it anew"


def read_metrics(path: Path, needed: Mapping[str, type] | None = None) -> dict[str, Any]:
    """The content of metrics.json; of a run from before it named its headline, with that of its method.

    Raises ConfigError where it is not what a run writes, or lacks facts that are `needed`.
    """
    metrics = read_object(path, needed or {}, REMEDY)
    for key, value in metrics.items():
        if key.startswith(("val", "best/")) and not isinstance(value, int | float | None):
            raise ConfigError(f"{path}: is not what a run writes ({key} is {value!r}); {REMEDY}")
    if "headline" not in metrics and metrics.get("method") in config.names("method"):
        metrics["headline"] = facts(metrics["method"]).headline
    return metrics
