"""metrics.json of a finished run, read without importing its method."""

import json
from pathlib import Path
from typing import Any

import config
from lightning_modules.facts import facts


def read_metrics(path: Path) -> dict[str, Any]:
    """The content of metrics.json; of a run from before it named its headline, with that of its method."""
    metrics = json.loads(path.read_text())
    if "headline" not in metrics and metrics.get("method") in config.names("method"):
        metrics["headline"] = facts(metrics["method"]).headline
    return metrics
