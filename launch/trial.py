"""One training of a sweep or of a comparison: its values, its folder, and what became of it."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.formats.tables import read_object
from engine.records.metrics_file import read_metrics
from evaluation import headline


@dataclass
class Trial:
    """One trial: its values, its run folder, and what became of it."""

    index: int
    values: dict[str, Any]
    words: list[str]
    folder: Path
    state: str = "waiting"
    score: float | None = None
    seconds: float | None = None
    note: str = field(default="")
    target: str | None = None
    """The key of the score."""
    closing: float | None = None
    """Seconds of the work behind the last step."""

    @property
    def name(self) -> str:
        """`stego seed 0`, or the values that a sweep tries: `seed 3, lr 0.001`, floats with three digits."""
        if list(self.values) == ["method", "seed"]:
            return f"{self.values['method']} seed {self.values['seed']}"
        texts = {key: f"{value:.3g}" if isinstance(value, float) else value for key, value in self.values.items()}
        return ", ".join(f"{brief(key, self.values)} {text}" for key, text in texts.items())

    @property
    def log(self) -> Path:
        """Everything that its training prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def look(self, target: str | None) -> None:
        """Take the state and the score from the run folder; `target`: the key of the score, None: the headline."""
        path = self.folder / "metrics.json"
        if path.is_file():
            metrics = read_metrics(path)
            self.state, self.target = "finished", target or headline.key_of(metrics)
            self.score = metrics.get(self.target)
        environment = self.folder / "environment.json"
        if self.state == "finished" and environment.is_file():
            remedy = "delete it and metrics.json, then the same training writes them anew"
            facts = read_object(environment, {"seconds": (int, float)}, remedy)
            self.seconds, self.closing = facts["seconds"], facts.get("closing_seconds")


def brief(key: str, keys: Iterable[str]) -> str:
    """The shortest end of a key, in whole parts, that no other of `keys` ends with: `self.weight` of two weights."""
    parts = key.split(".")
    ends = (".".join(parts[start:]) for start in range(len(parts) - 1, 0, -1))
    return next((end for end in ends if not any(k != key and f".{k}".endswith(f".{end}") for k in keys)), key)
