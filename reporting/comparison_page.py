"""A comparison as one page: sorting tables, bars, curves, classes, pictures, clusters, environment.

What is here says what stands on the page; `templates/comparison.html.j2` lays it out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reporting import charts, page, published
from reporting.charts import Bar, Bars, Curve, Plot
from reporting.comparison import SCORE, Entry, Finished, Section, column_name
from reporting.comparison_tables import (
    HEADS,
    STAGES,
    facts,
    memory_text,
    protocol_text,
    published_text,
    scores_of,
    speed_text,
)
from reporting.page import Cell, Picture, Table, numeric
from reporting.published import Cited


@dataclass(frozen=True)
class Gallery:
    """The same pictures under every entry: rows of them, by what they show; `missing`: why an entry has no row."""

    rows: Mapping[str, Sequence[Picture]]
    legend: Sequence[tuple[str, str]] = ()
    """Names of the classes with their colours (#rrggbb); empty without labels."""
    missing: Sequence[str] = ()


@dataclass(frozen=True)
class Part:
    """All that is shown of one protocol."""

    differs: Sequence[str]
    protocol: str
    tables: Sequence[tuple[str, Table]]
    notes: Sequence[str]
    bars: Sequence[tuple[str, Bars]]
    published: bool
    beside: str
    gallery: Gallery
    entries: Sequence[str]
    curves: Sequence[Plot]
    heat_maps: Sequence[tuple[str, Table]]
    """Of every probe."""
    clusters: Sequence[tuple[str, Table]]
    """Of every run."""


def render(
    title: str,
    sections: Sequence[Section],
    galleries: Sequence[Gallery],
    failures: Sequence[str],
    twice: Sequence[str] = (),
    cited: Sequence[Cited] = (),
) -> str:
    """The page. `galleries`: one a section; `failures`: trainings that are missing, `twice`: runs that stand for a
    training that is counted already, one line each; `cited`: published rows, in tables of their own below."""
    runs = [run for section in sections for entry in section.entries for run in entry.runs]
    return page.render(
        "comparison.html.j2",
        title=title,
        runs=len(runs),
        entries=sum(len(section.entries) for section in sections),
        failures=failures,
        twice=twice,
        parts=[
            part(number, section, gallery)
            for number, (section, gallery) in enumerate(zip(sections, galleries, strict=True), 1)
        ],
        cited=[(name, Table(*published.table(own), f"cited-{name}")) for name, own in published.by_data(cited).items()],
        said=published.SAID,
        environment=environment(runs),
        versions=versions(runs),
    )


def part(number: int, section: Section, gallery: Gallery) -> Part:
    """What is shown of the protocol `number`."""
    stages = [(stage, scores_of(section, stage)) for stage in STAGES if section.columns(stage)]
    return Part(
        differs=section.differs,
        protocol=protocol_text(section),
        tables=[(what, scores(section, stage, f"{stage}{number}")) for stage, what in stages],
        notes=section.notes(),
        bars=[(probe, bars(section, probe)) for probe in section.probes()],
        published=bool(section.published),
        beside=section.beside,
        gallery=gallery,
        entries=[entry.label for entry in section.entries],
        curves=learning(section),
        heat_maps=heat_maps(section) if section.classes() else [],
        clusters=cluster_tables(section) if section.classes() else [],
    )


def scores(section: Section, stage: str, name: str) -> Table:
    """The table that sorts, scores behind the method, so that a narrow screen shows them; the highest mean of a column
    is bold where it is ahead by more than the spreads."""
    columns = section.columns(stage)
    ahead = {column: section.ahead(stage, *column) for column in columns}
    first, *others = HEADS
    of = ["score of"] * (columns[0][0] == SCORE)
    heads = [first, *of, *(numeric(column_name(*column)) for column in columns)]
    heads += [numeric(head) if head in ("steps", "batch") else head for head in others]
    known = section.published and stage == section.beside
    if stage == "val":
        heads += [numeric("pictures /s"), numeric("peak MiB")]
    heads += ["published"] * known
    rows = []
    for entry in section.entries:
        row: list[str | Cell] = [Cell(entry.label, entry.label, "wide"), *[entry.headline] * len(of)]
        for column in columns:
            score = entry.cell(stage, *column)
            text, value = ("-", "") if score is None else (score.text(), score.mean)
            row.append(Cell(text, value, "number best" if ahead[column] is entry else "number"))
        _, backbone, seeds, *counts, labels = facts(entry, stage)
        row += [backbone, seeds, *(Cell(count, count, "number") for count in counts)]
        row.append(labels)
        if stage == "val":
            speed = entry.score("train_images_per_second")
            peaks = [run.memory[1] for run in entry.runs if run.memory is not None]
            row += [
                Cell(speed_text(entry), "" if speed is None else speed.mean, "number"),
                Cell(memory_text(entry), max(peaks, default=""), "number"),
            ]
        row += [Cell(published_text(entry) or "-", classes="wide")] * known
        rows.append(row)
    return Table(heads, rows, name)


def bars(section: Section, probe: str) -> Bars:
    """mIoU of a probe under every entry."""
    rows, stage = [], section.beside if section.published else "val"
    for place, entry in enumerate(section.entries):
        score = entry.cell(stage, probe, "miou")
        if score is not None:
            rows.append(Bar(shown_as(entry, probe), score.mean, score.spread, entry.figure(probe), place))
    return charts.bars(rows)


def shown_as(entry: Entry, probe: str) -> str:
    """The label of an entry, with the probe that its score is read from where these differ."""
    return f"{entry.label}: {entry.headline}" if probe.removesuffix("_crf") == SCORE else entry.label


def learning(section: Section) -> list[Plot]:
    """Validation scores against the step, of every probe that was scored more than once."""
    plots = []
    for probe, metric in section.columns():
        if metric not in ("miou", "entropy"):
            continue
        lines = []
        for entry in section.entries:
            key = entry.key("val", probe, metric)
            known = key is not None
            lines.append(
                Curve(entry.label, entry.curve(key) if known else [], [run.history(key) for run in entry.runs if known])
            )
        if max((len(line.points) for line in lines), default=0) > 1:
            plots.append(charts.curves(lines, column_name(probe, metric)))
    return plots


def heat_maps(section: Section) -> list[tuple[str, Table]]:
    """IoU of every class under every entry, a table a probe; classes from the most to the least frequent."""
    found = []
    for probe in section.probes():
        columns = [entry.class_scores(probe) for entry in section.entries]
        heads = ["class", *(numeric(shown_as(entry, probe)) for entry in section.entries)]
        rows = [[name, *(column.get(name) for column in columns)] for name in section.classes()]
        found.append((probe, Table(heads, rows, f"classes-{probe}")))
    return found


def cluster_tables(section: Section) -> list[tuple[str, Table]]:
    """Which class each cluster was matched to, of every run."""
    found = []
    for entry in section.entries:
        for run in entry.runs:
            rows = [
                [page.number(int(row["cluster"]), 0), row["class"] or "-", page.number(int(row["pixels"]), 0),
                 page.number(float(row["share"]) if row["share"] else None)]
                for row in run.table("clusters.csv")
            ]  # fmt: skip
            heads = [numeric("cluster"), "class", numeric("pixels"), numeric("% of them in the class")]
            if rows:
                found.append((f"{entry.label}, seed {run.metrics['seed']}", Table(heads, rows)))
    return found


def environment(runs: Sequence[Finished]) -> Table:
    """With what and where every run was made; the last cell of a row is its command."""
    heads = ["run", "seed", "device", "processes", numeric("seconds"), "torch", "commit", "command"]
    rows = []
    for run in runs:
        facts = run.environment
        commit = (facts["git_commit"] or "-")[:10] + ("+" if (facts["git_commit"] or "").endswith("+") else "")
        rows.append([
            run.shown, str(facts["seed"]), facts["device"], str(facts["processes"]),
            page.number(facts["seconds"], 0), facts["versions"]["torch"], commit, " ".join(facts["command"]),
        ])  # fmt: skip
    return Table(heads, rows, "environment")


def versions(runs: Sequence[Finished]) -> list[str]:
    """Every version of a library that a run was made with."""
    return sorted({f"{name} {version}" for run in runs for name, version in run.environment["versions"].items()})
