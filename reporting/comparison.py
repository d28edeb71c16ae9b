"""Finished runs side by side: what belongs together, what must not stand in one table, means and spreads.

A run is read from its folder. Runs that differ in nothing but the seed are one entry. Entries that were evaluated in
the same way are one section; where sections differ, the difference has a name.
"""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.formats.tables import read_object, read_rows
from evaluation import headline
from reporting.report import LAST_STEP, PROBES, method_of

TRAINING_ONLY = (
    "data.root", "data.train_", "data.batch_size", "data.eval_batch_size", "data.workers", "data.cache", "data.flip_p",
    "data.five_crop_ratio", "data.max_broken", "data.lists", "data.eval_size", "data.eval_crop", "data.interpolation",
)  # fmt: skip
"""Keys of `data` that do not say how a picture is evaluated, or that have a `protocol/…` of their own."""
OF_ONE_PROBE = ("protocol/linear_posthoc", "protocol/retrieval", "protocol/partition", "protocol/fcn",
                "protocol/overcluster_", "protocol/cbfe", "protocol/communities")  # fmt: skip
"""Beginnings of facts that concern one read-out alone: a run without that read-out is no other protocol."""
SAME_ENTRY = ("seed", "run.", "wandb.", "logger", "cache.", "trainer.progress", "trainer.threads", "data.workers",
              "data.cache", "evaluation.panels", "predict.", "search.", "method.init_from")  # fmt: skip
"""Keys that may differ between the runs of one entry."""
SCORE = "score"
"""In place of a probe: that of each entry's headline, where entries of a section differ in it."""
FEW = 3
"""Fewer runs than this have no spread."""
RANKED = ("/acc", "/miou", "/iou", "/corloc")
"""What is compared with labels. Entropy guards against collapse, and a confidence belongs to its own space of codes."""
METRICS = {"method": str, "seed": int}
ENVIRONMENT = {
    "peak_memory": dict, "versions": dict, "device": str, "processes": int, "seconds": (int, float), "command": list,
    "git_commit": (str, type(None)),
}  # fmt: skip
"""What is read of metrics.json, beside scores, and of environment.json."""


@dataclass(frozen=True)
class Finished:
    """A finished run: its folder and what its files hold."""

    folder: Path
    metrics: dict[str, Any]
    config: dict[str, Any]
    """Flat: dotted key -> value."""
    environment: dict[str, Any]
    title: str = ""
    """The method's name in papers."""
    tables: Path | None = None
    """Of an evaluation: where its scores lie."""
    checkpoint: Path | None = None
    """What was evaluated; None: the run's last.ckpt."""
    words: tuple[str, ...] = ()
    """What the evaluation changed in the run's configuration."""

    @property
    def read_from(self) -> Path:
        """The checkpoint that the scores are of."""
        return self.checkpoint or self.folder / "checkpoints" / "last.ckpt"

    @property
    def shown(self) -> str:
        """The name of its folder, with that of the evaluation where there is one."""
        inside = self.tables is not None and self.tables != self.folder
        return f"{self.folder.name}/eval/{self.tables.name}" if inside else self.folder.name

    @classmethod
    def read(cls, folder: Path, flatten: Callable[[Any], dict[str, Any]], load: Callable[[Path], Any]) -> "Finished":
        """Raises ConfigError where the folder holds no finished run. `load` reads config.yaml, to be flattened."""
        for name in ("metrics.json", "config.yaml", "environment.json"):
            if not (folder / name).is_file():
                raise ConfigError(
                    f"runs: {folder} holds no finished run ({name} is missing); finish it, or leave it out"
                )
        remedy = "train it anew (run.overwrite=true), or leave it out"
        metrics = read_object(folder / "metrics.json", METRICS, remedy)
        environment = read_object(folder / "environment.json", ENVIRONMENT, remedy)
        return cls(folder, metrics, flatten(load(folder / "config.yaml")), environment)

    @property
    def memory(self) -> tuple[str, float] | None:
        """(`GPU` or `host`, MiB): peak memory on the GPU where there was one."""
        peak = self.environment["peak_memory"]
        kind = "gpu_mib" if "gpu_mib" in peak else "resident_mib"
        return ("GPU" if kind == "gpu_mib" else "host", peak[kind]) if kind in peak else None

    @property
    def protocol(self) -> dict[str, Any]:
        """How it was evaluated: what must be equal for scores to be compared."""
        own = {key: value for key, value in self.config.items() if key.startswith("data.")}
        own = {key: value for key, value in own.items() if not key.startswith(TRAINING_ONLY)}
        if self.config["data.name"] == "folder":
            own["data.root"] = self.config["data.root"]
        own["clusters"] = self.config["method.num_clusters"]
        own |= {key: value for key, value in self.metrics.items() if key.startswith("protocol/")}
        return {key: value for key, value in own.items() if not key.startswith(OF_ONE_PROBE)}

    def history(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of a column of metrics.csv; empty where it has none."""
        path = self.folder / "metrics.csv"
        if not path.is_file():
            return []
        return sorted((int(row["step"]), float(row[key])) for row in read_rows(path, whole=["step"]) if row.get(key))

    def table(self, name: str) -> list[dict[str, str]]:
        """The rows of classes.csv or clusters.csv; none where the data had no labels."""
        path = (self.tables or self.folder) / name
        if not path.is_file():
            return []
        whole, numbers = (("cluster", "pixels"), ["share"]) if name == "clusters.csv" else (["pixels"], [])
        return [row for row in read_rows(path, ("class", "group"), whole, numbers) if "class" in row]


@dataclass
class Entry:
    """Runs that differ in the seed alone: a row of the table."""

    runs: list[Finished]
    label: str = ""
    published: dict[str, float] = field(default_factory=dict)
    """`<probe>/<metric>` -> published figure, where these runs are the published recipe."""
    source: str = ""

    @property
    def first(self) -> Finished:
        return self.runs[0]

    @property
    def method(self) -> str:
        """With the one whose codes it began with, where there is one."""
        return method_of(self.first.metrics)

    @property
    def title(self) -> str:
        """The label with the method's name as papers write it."""
        return (self.first.title or self.method) + self.label.removeprefix(self.method)

    @property
    def headline(self) -> str:
        """The probe that its method's score is read from."""
        return headline.probe_of(self.first.metrics)

    def key(self, stage: str, probe: str, metric: str) -> str | None:
        """The key that stands in this column; None where the entry has nothing to say there.

        The online clusters of a method whose score is k-means on the same codes are that score done less well.
        """
        if probe.removesuffix("_crf") == SCORE:
            probe = probe.replace(SCORE, self.headline)
            metric = headline.expected(self.headline).rsplit("/", 1)[1]
        elif self.headline == "kmeans" and probe.removesuffix("_crf") == "cluster" and metric in ("acc", "miou"):
            return None
        return f"{stage}/{probe}/{metric}"

    def cell(self, stage: str, probe: str, metric: str) -> "Score | None":
        """What stands in a column of this row."""
        key = self.key(stage, probe, metric)
        return None if key is None else self.score(key)

    def figure(self, probe: str) -> float | None:
        """The published mIoU of a column."""
        key = self.key("", probe, "miou")
        return None if key is None else self.published.get(key.removeprefix("/"))

    @property
    def seeds(self) -> list[int]:
        return [run.metrics["seed"] for run in self.runs]

    def values(self, key: str) -> list[float]:
        """A metric of every run that has it."""
        return [run.metrics[key] for run in self.runs if run.metrics.get(key) is not None]

    def score(self, key: str) -> "Score | None":
        """Mean and spread of a metric; None unless all runs have it (some have no best/* of offline probes)."""
        values = self.values(key)
        return Score.of(values) if len(values) == len(self.runs) else None

    def class_scores(self, probe: str) -> dict[str, float]:
        """Class -> mean IoU over the runs, percent; none of a probe that is not shown of this entry."""
        key = self.key("val", probe, "miou")
        probe = "" if key is None else key.split("/")[1]
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for row in run.table("classes.csv"):
                if row.get(probe):
                    found.setdefault(row["class"], []).append(float(row[probe]))
        return {name: statistics.fmean(values) for name, values in found.items()}

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Means over the runs at the steps that all of them have."""
        curves = [dict(run.history(key)) for run in self.runs]
        shared = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
        return [(step, statistics.fmean(curve[step] for curve in curves)) for step in shared]


@dataclass(frozen=True)
class Score:
    """Mean and sample standard deviation (n - 1) of n runs; no deviation of fewer than FEW."""

    mean: float
    spread: float | None
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Score | None":
        if not values:
            return None
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) >= FEW else None, len(values))

    def text(self, join: str = " ± ") -> str:
        """`25.6 ± 1.2`, of two runs `25.6 (n=2)`, of a single one `25.6`."""
        few = f" (n={self.count})" if self.count > 1 else ""
        return f"{self.mean:.1f}" + (few if self.spread is None else f"{join}{self.spread:.1f}")


@dataclass
class Section:
    """Entries of one protocol: they may stand side by side."""

    entries: list[Entry]
    protocol: dict[str, Any]
    differs: list[str] = field(default_factory=list)
    """What differs from the first section: `key: there -> here`."""

    @property
    def mixed(self) -> bool:
        """Whether its entries are known by scores of different probes."""
        return len({entry.headline for entry in self.entries}) > 1

    def scored(self, stage: str = "val") -> list[tuple[str, str]]:
        """(probe, metric) of the scores: accuracy and mIoU, or what can be said without labels; headlines first.

        None of the best checkpoint where that is the last step by rule.
        """
        if stage == "best" and all(run.metrics["selection/rule"] == LAST_STEP for e in self.entries for run in e.runs):
            return []
        keys = [key.split("/") for entry in self.entries for run in entry.runs for key in run.metrics]
        found = {(parts[1], parts[2]) for parts in keys if len(parts) == 3 and parts[0] == stage}
        wanted = ("acc", "miou") if any(metric == "miou" for _, metric in found) else ("entropy", "confidence")
        leading = [entry.headline for entry in self.entries]
        probes = dict.fromkeys([*leading, *PROBES, *sorted(probe for probe, _ in found)])
        return [(probe, metric) for probe in probes for metric in wanted if (probe, metric) in found]

    def columns(self, stage: str = "val") -> list[tuple[str, str]]:
        """(probe, metric) of the columns that are shown: those in which an entry has something to say, and SCORE in
        front where entries are known by scores of different probes."""
        scored = self.scored(stage)
        labelled = any(metric == "miou" for _, metric in scored)
        columns = [*[(SCORE, "miou"), (f"{SCORE}_crf", "miou")] * (self.mixed and labelled), *scored]
        return [
            column for column in columns
            if any(entry.values(key) for entry in self.entries if (key := entry.key(stage, *column)) is not None)
        ]  # fmt: skip

    @property
    def beside(self) -> str:
        """The stage whose scores published figures stand beside: they are those of the best checkpoint, where one was
        chosen, with every read-out."""
        return "best" if self.columns("best") else "val"

    @property
    def published(self) -> bool:
        """Whether one of its entries is a published recipe."""
        return any(entry.published for entry in self.entries)

    def probes(self) -> list[str]:
        """Read-outs that have an mIoU, the headline first."""
        return [probe for probe, metric in self.columns() if metric == "miou"]

    def ahead(self, stage: str, probe: str, metric: str) -> Entry | None:
        """The entry whose mean is above all others by more than their spread and its own together, in a metric that
        ranks; None where none is, or where a spread is not known."""
        if f"/{metric}" not in RANKED:
            return None
        cells = {id(entry): entry.cell(stage, probe, metric) for entry in self.entries}
        found = sorted((score for score in cells.values() if score is not None), key=lambda score: -score.mean)
        if len(found) < 2 or any(score.spread is None for score in found):
            return None
        best, *others = found
        if any(best.mean - other.mean <= best.spread + other.spread for other in others):
            return None
        return next(entry for entry in self.entries if cells[id(entry)] is best)

    def classes(self) -> list[str]:
        """Class names, the most frequent first."""
        rows = [row for entry in self.entries for row in entry.first.table("classes.csv")]
        pixels = {row["class"]: int(row["pixels"]) for row in rows}
        return sorted(pixels, key=lambda name: -pixels[name])

    def notes(self) -> list[str]:
        """Further differences between its entries that a reader has to know."""
        found = []
        known = dict.fromkeys(key for entry in self.entries for run in entry.runs for key in run.metrics)
        for key in (key for key in known if key.startswith(OF_ONE_PROBE)):
            values = {str(run.metrics[key]) for entry in self.entries for run in entry.runs if key in run.metrics}
            if len(values) > 1:
                found.append(
                    f"{key.removeprefix('protocol/')} differs between these runs: {' | '.join(sorted(values))}"
                )
        rules = {run.metrics["selection/rule"] for entry in self.entries for run in entry.runs}
        if len(rules) > 1 and self.columns("best"):
            found.append(f"the best checkpoint was chosen by different rules: {' | '.join(sorted(rules))}")
        for entry in self.entries:
            values = {run.environment["device"] for run in entry.runs} | {
                str(run.environment["processes"]) for run in entry.runs
            }
            if len(values) > 2:
                found.append(
                    f"{entry.label}: its runs were made on different devices; speed and memory are their means"
                )
        return found


def kind(run: Finished) -> str:
    """What is equal for the runs of one entry: settings and protocol."""
    settings = {key: value for key, value in run.config.items() if not key.startswith(SAME_ENTRY)}
    return repr((sorted(settings.items()), sorted(run.protocol.items()), run.read_from.name))


def once(runs: Iterable[Finished]) -> tuple[list[Finished], list[str]]:
    """The runs without those that repeat the configuration and seed of one before, and a line for each of these."""
    kept: dict[tuple[str, int], Finished] = {}
    twice = []
    for run in runs:
        method, seed = run.metrics["method"], run.metrics["seed"]
        first = kept.setdefault((kind(run), seed), run)
        if first is not run:
            twice.append(
                f"{run.tables or run.folder} is left out: {method}, seed {seed} in the configuration of "
                f"{first.tables or first.folder}"
            )
    return list(kept.values()), twice


def arrange(runs: Iterable[Finished]) -> list[Section]:
    """Runs -> sections of one protocol each, in the order in which they come; entries are named."""
    entries: dict[str, list[Finished]] = {}
    for run in runs:
        entries.setdefault(kind(run), []).append(run)
    for group in entries.values():
        group.sort(key=lambda run: run.metrics["seed"])
    found = [Entry(group) for group in entries.values()]
    sections: dict[str, Section] = {}
    for entry in found:
        protocol = entry.first.protocol
        sections.setdefault(repr(sorted(protocol.items())), Section([], protocol)).entries.append(entry)
    for section in sections.values():
        name(section.entries)
    first, *others = sections.values()
    for section in others:
        section.differs = differences(first.protocol, section.protocol)
    return [first, *others]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """`key: one -> other` for every key whose values differ; `not set` where one lacks it."""
    keys = [key for key in dict.fromkeys([*one, *other]) if one.get(key) != other.get(key)]
    return [
        f"{key.removeprefix('protocol/')}: {one.get(key, 'not set')} -> {other.get(key, 'not set')}" for key in keys
    ]


def name(entries: list[Entry]) -> None:
    """A label for each entry: its method, and where that is not enough the settings that tell it from the first."""
    for entry in entries:
        same = [other for other in entries if other.method == entry.method]
        base = same[0].first.config
        own = {
            key: value
            for key, value in entry.first.config.items()
            if not key.startswith(SAME_ENTRY) and base.get(key) != value
        }
        if entry.first.read_from.name != same[0].first.read_from.name:
            own = {"checkpoint": entry.first.read_from.name, **own}
        shown = [f"{key.removeprefix('method.')}={value}" for key, value in list(own.items())[:3]]
        more = f", {len(own) - 3} more" if len(own) > 3 else ""
        entry.label = entry.method + (f" ({', '.join(shown)}{more})" if own else "")


def column_name(probe: str, metric: str) -> str:
    """`cluster mIoU`"""
    return f"{probe} {headline.SHOWN[metric]}"
