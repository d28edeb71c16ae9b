"""Scores as tables and files: the closing table of a run, per-class IoU, clusters.csv, metrics.json."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.files import write_text
from common.names import written
from common.spec import ClassMeta
from evaluation import headline
from evaluation.matching import UNMATCHED, Scores, partition
from reporting import panels

PROBES = ("cluster", "kmeans", "own", "regions", "linear", "linear_posthoc", "fcn", "retrieval")
"""Order of the rows; further probes follow in the order of the metrics."""
LAST_STEP = "last step"
"""`selection/rule` where nothing but the last step is the best."""

LABEL_FREE = (
    "no labels: entropy is 100 where all clusters are used alike and 0 where one takes all, confidence the mean cosine "
    "of a patch to its centroid in percent; they show a collapse and rank nothing. Look at panels/sheet.png."
)
"""What the table of a run without labels says."""


def flatten(
    stage: str,
    probe: str,
    scores: Scores | Mapping[str, float],
    groups: Mapping[str, Sequence[int]] | None = None,
    restricted: bool = False,
) -> dict[str, float | None]:
    """The result of a metric's compute() as flat metrics.json entries: `<stage>/<probe>/<metric>`, percent.

    Scores give `acc` and `miou`, and `acc_<group>` and `miou_<group>` of every group of classes (`matching.partition`);
    a mapping gives its own names. NaN and infinity become None.
    """
    values = {"acc": scores.acc, "miou": scores.miou} if isinstance(scores, Scores) else scores
    for name, (acc, miou) in partition(scores, groups, restricted).items() if groups else ():
        values |= {f"acc_{name}": acc, f"miou_{name}": miou}
    return {f"{stage}/{probe}/{name}": plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """A value as JSON takes it: tensors and numpy numbers as Python's, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {written(str(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return written(value) if isinstance(value, str) else value


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically: a reader sees the old file or the whole new one. NaN is written as null."""
    write_text(path, json.dumps(plain(content), indent=2, allow_nan=False) + "\n")


def method_of(metrics: Mapping[str, Any]) -> str:
    """The method of a run as tables name it: `primaps on stego` where it began with codes of another one."""
    base = metrics.get("stands_on")
    return metrics["method"] + (f" on {base}" if base else "")


def final_table(metrics: Mapping[str, Any], title: str = "") -> Table:
    """The table at the end of a run: a row a probe, columns acc and mIoU, and the same of the best checkpoint. The
    headline probe stands first.

    Reads `val/<probe>/acc|miou` and `best/<probe>/acc|miou` of the flat metrics; without labels it shows the label-free
    keys instead. The best columns are left out where there are none, or where the last step is the best by rule; those
    of published figures (`published/<probe>/acc|miou`) where there are none. Scores at several resolutions
    (`val@320/<probe>/acc|miou`) stand below each other, with a first column that names the pixels.
    """
    names = ("acc", "miou") if any(key.endswith("/miou") for key in metrics) else ("entropy", "confidence")
    stages = list(dict.fromkeys(key.split("/")[0] for key in metrics if key.startswith(("val/", "val@"))))
    sized = any("@" in stage for stage in stages)
    others = ["best"] if metrics.get("selection/rule") != LAST_STEP else []
    others += [] if sized else ["published"]  # figures are published for one resolution
    beside = [stage for stage in others if any(key.startswith(f"{stage}/") for key in metrics)]
    table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
    if sized:
        table.add_column("px", justify="right")
    table.add_column("probe")
    for column in ("", *beside):
        for name in names:
            table.add_column(f"{column} {'mIoU' if name == 'miou' else name}".strip(), justify="right")
    for stage in stages:
        for probe in _probes(metrics, stage, names):
            keys = [f"{source}/{probe}/{name}" for source in (stage, *beside) for name in names]
            cells = [spread(metrics.get(key), metrics.get(f"{key}_std")) for key in keys]
            bold = "bold" if probe == headline.probe_of(metrics) else None
            table.add_row(*[stage.partition("@")[2]] * sized, probe, *cells, style=bold)
        table.add_section()
    return table


def number(value: float | None) -> str:
    """A percentage with one digit, or a dash for nothing."""
    value = plain(value)
    return "-" if value is None else f"{value:.1f}"


def spread(mean: float | None, deviation: float | None = None) -> str:
    """A percentage, with the standard deviation of the runs of its read-out where it has several."""
    return number(mean) if deviation is None or plain(mean) is None else f"{number(mean)} ± {number(deviation)}"


def per_class_table(results: Mapping[str, Scores], meta: ClassMeta) -> Table:
    """IoU of every class under every probe, in percent, with the class's share of the labelled pixels."""
    table = Table(title="IoU by class, %", title_justify="left", title_style="bold", header_style="bold")
    table.add_column("class")
    table.add_column("pixels", justify="right")
    for probe in results:
        table.add_column(probe, justify="right")
    pixels = next(iter(results.values())).counts.sum(0)
    for i, name in enumerate(meta.names):
        share = 100 * pixels[i] / max(1, pixels.sum())
        table.add_row(Text(name), f"{share:.1f}", *(number(float(scores.iou[i])) for scores in results.values()))
    table.add_section()
    table.add_row("mean", "", *(number(scores.miou) for scores in results.values()))
    return table


def as_text(table: Table, width: int = 120) -> str:
    """A table as plain text, for logs and files."""
    console = Console(file=StringIO(), width=width, no_color=True)
    console.print(table)
    return console.file.getvalue()


def per_class_csv(path: str | Path, results: Mapping[str, Scores], meta: ClassMeta) -> None:
    """Columns class_id, class, pixels, then IoU in percent under each probe; empty where a class is skipped.

    Where the data set tells them apart, a column `group` behind the class says things or stuff.
    """
    pixels = next(iter(results.values())).counts.sum(0)
    group = {i: name for name, ids in meta.groups.items() for i in ids}
    rows = [["class_id", "class", *["group"] * bool(group), "pixels", *results]]
    for i, name in enumerate(meta.names):
        known = [group[i]] if group else []
        rows.append([i, name, *known, int(pixels[i]), *(_digits(scores.iou[i]) for scores in results.values())])
    write_text(path, _csv(rows))


def clusters_csv(path: str | Path, scores: Scores, meta: ClassMeta) -> None:
    """What each cluster became: cluster, class_id, class, pixels, share.

    class_id -1 and an empty name where unmatched; pixels: labelled pixels it won; share: percent of them that belong to
    its class, empty for an unmatched or empty cluster.
    """
    rows = [["cluster", "class_id", "class", "pixels", "share"]]
    for cluster, target in enumerate(scores.mapping.tolist()):
        pixels = int(scores.counts[cluster].sum())
        matched = target != UNMATCHED
        share = 100 * scores.counts[cluster, target] / pixels if matched and pixels else math.nan
        rows.append([cluster, target, meta.names[target] if matched else "", pixels, _digits(share)])
    write_text(path, _csv(rows))


def write_scores(folder: str | Path, results: Mapping[str, Scores], meta: ClassMeta, main: str = "cluster") -> None:
    """The files of a run folder that need labels: classes.csv; clusters.csv and confusion.png of probe `main`."""
    folder = Path(folder)
    per_class_csv(folder / "classes.csv", results, meta)
    clusters_csv(folder / "clusters.csv", results[main], meta)
    scores = results[main]
    title = f"{main} probe ({scores.matching}): acc {number(scores.acc)}, mIoU {number(scores.miou)}"
    panels.confusion(folder / "confusion.png", scores, meta, title)


def _probes(metrics: Mapping[str, Any], wanted: str, names: tuple[str, ...]) -> list[str]:
    keys = [key.split("/") for key in metrics if key.count("/") == 2]
    found = list(dict.fromkeys(probe for stage, probe, name in keys if stage == wanted and name in names))
    found.sort(key=lambda probe: PROBES.index(probe) if probe in PROBES else len(PROBES))
    return headline.first(headline.probe_of(metrics), found)


def _digits(value: float) -> str:
    return "" if np.isnan(value) else f"{float(value):.4f}"


def _csv(rows: list[list]) -> str:
    buffer = StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()
