"""A comparison as one page of html: sorting tables, bars, curves, classes, pictures, clusters, environment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reporting import charts, page
from reporting.charts import Bar, Curve
from reporting.comparison import SCORE, Entry, Finished, Section, column_name
from reporting.comparison_tables import HEADS, STAGES, facts, memory_text, protocol_text, published_text, speed_text
from reporting.page import Cell, escape

STYLE = """
.gallery { display: grid; gap: 4px 6px; min-width: 620px; align-items: start; }
.gallery .side { font-size: .85rem; overflow-wrap: anywhere; padding-right: .3rem; }
.gallery img { width: 100%; }
body { max-width: 1320px; }
.scores table { font-size: .86rem; border-collapse: separate; border-spacing: 0; }
.scores th { white-space: normal; vertical-align: bottom; } .scores td, .scores th { padding: .3rem .22rem; }
.scores td:first-child, .scores th:first-child { position: sticky; left: 0; background: var(--paper); }
.scores thead th:first-child { background: var(--shade); }
.scores td.wide { min-width: 8.5rem; }
nav a { margin-right: .9rem; white-space: nowrap; }
"""


@dataclass(frozen=True)
class Gallery:
    """The same pictures under every entry: rows of <img>, by what they show; `missing`: why an entry has no row."""

    rows: Mapping[str, Sequence[str]]
    legend: str
    missing: Sequence[str] = ()


def render(
    title: str,
    sections: Sequence[Section],
    galleries: Sequence[Gallery],
    failures: Sequence[str],
    twice: Sequence[str] = (),
) -> str:
    """The page. `galleries`: one a section; `failures`: trainings that are missing, `twice`: runs that stand for a
    training that is counted already, one line each."""
    runs = sum(len(entry.runs) for section in sections for entry in section.entries)
    entries = sum(len(section.entries) for section in sections)
    parts = [
        f'<h1>{escape(title)}</h1><p class="lead">{runs} finished runs in {entries} rows. Scores in percent: mean ± '
        "standard deviation (n - 1) from three seeds on. Bold: ahead of all others by more than both deviations "
        "together. Batch: pictures a step over all devices. A click on a head sorts.</p>"
    ]
    if len(sections) > 1:
        places = "".join(f'<a href="#protocol{i}">Protocol {i}</a>' for i in range(1, len(sections) + 1))
        parts.append(
            f'<p class="differs"><b>{len(sections)} protocols.</b> Runs that were evaluated in different ways stand in '
            f"different parts of this page, and their numbers are not comparable.</p><nav>{places}</nav>"
        )
    parts += [f'<p class="differs"><b>Missing:</b> {escape(line)}</p>' for line in failures]
    parts += [f'<p class="differs"><b>Counted once:</b> {escape(line)}</p>' for line in twice]
    for number, (section, gallery) in enumerate(zip(sections, galleries, strict=True), 1):
        parts += section_parts(number, section, gallery, alone=len(sections) == 1)
    parts.append("<h2>Environment</h2>" + environment([run for s in sections for e in s.entries for run in e.runs]))
    return page.document(title, "\n".join(parts), charts.STYLE + STYLE)


def section_parts(number: int, section: Section, gallery: Gallery, alone: bool) -> list[str]:
    """All that is shown of one protocol."""
    parts = [] if alone else [f'<h2 id="protocol{number}">Protocol {number}</h2>']
    if section.differs:
        lines = "".join(f"<li>{escape(line)}</li>" for line in section.differs)
        parts.append(
            f'<div class="differs"><b>Not comparable with protocol 1</b>, which differs in:<ul>{lines}</ul></div>'
        )
    parts.append(f'<p class="note">Protocol: {escape(protocol_text(section))}</p>')
    for stage, what in STAGES.items():
        if section.columns(stage):
            parts.append(f"<h3>{what}</h3>" + scores(section, stage, f"{stage}{number}"))
    parts += [f'<p class="note">{escape(note)}</p>' for note in section.notes()]
    if section.probes():
        parts.append("<h2>mIoU</h2>")
        parts += [f"<h3>{probe}</h3>{bars(section, probe)}" for probe in section.probes()]
        if section.published:
            of = " Bars are those of the best checkpoint, as it is." if section.beside == "best" else ""
            parts.append(f'<p class="note">Dashed: the published figure of the recipe.{of}</p>')
    if gallery.rows:
        parts.append("<h2>Pictures</h2>" + pictures(gallery))
    parts += [f'<p class="note">{escape(line)}</p>' for line in gallery.missing]
    parts.append("<h2>While training</h2>" + learning(section))
    if section.classes():
        parts.append("<h2>Classes</h2>" + heat_maps(section))
        parts.append("<h2>Clusters and classes</h2>" + cluster_tables(section))
    return parts


def scores(section: Section, stage: str, name: str) -> str:
    """The table that sorts, scores behind the method, so that a narrow screen shows them; the highest mean of a column
    is bold where it is ahead by more than the spreads."""
    columns = section.columns(stage)
    ahead = {column: section.ahead(stage, *column) for column in columns}
    first, *others = HEADS
    of = ["score of"] * (columns[0][0] == SCORE)
    heads = [first, *of, *(Cell(column_name(*column), classes="number") for column in columns)]
    heads += [Cell(head, classes="number") if head in ("steps", "batch") else head for head in others]
    known = section.published and stage == section.beside
    if stage == "val":
        heads += [Cell("pictures /s", classes="number"), Cell("peak MiB", classes="number")]
    heads += ["published"] * known
    rows = []
    for entry in section.entries:
        row: list[str | Cell] = [Cell(escape(entry.label), entry.label, "wide"), *[entry.headline] * len(of)]
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
        row += [Cell(escape(published_text(entry)) or "-", classes="wide")] * known
        rows.append(row)
    return f'<div class="scores">{page.table(heads, rows, name=name)}</div>'


def bars(section: Section, probe: str) -> str:
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


def pictures(gallery: Gallery) -> str:
    """A row of pictures for the input, the truth, and every entry."""
    count = max(len(images) for images in gallery.rows.values())
    cells = "".join(
        f'<span class="side">{escape(label)}</span>{"".join(images)}' for label, images in gallery.rows.items()
    )
    columns = f"grid-template-columns:9.5rem repeat({count},1fr)"
    return f'<div class="scroll"><div class="gallery" style="{columns}">{cells}</div></div>{gallery.legend}'


def learning(section: Section) -> str:
    """Validation scores against the step, by probe."""
    found = section.columns()
    wanted = [column for column in found if column[1] in ("miou", "entropy")]
    parts = []
    for probe, metric in wanted:
        keys = {id(entry): entry.key("val", probe, metric) for entry in section.entries}
        lines = [
            Curve(entry.label, entry.curve(key), [run.history(key) for run in entry.runs])
            if (key := keys[id(entry)]) is not None
            else Curve(entry.label, [])
            for entry in section.entries
        ]
        if max((len(line.points) for line in lines), default=0) > 1:
            parts.append(
                f"<h3>{escape(column_name(probe, metric))}</h3>{charts.curves(lines, column_name(probe, metric))}"
            )
    names = page.legend(
        [entry.label for entry in section.entries], [charts.colour(i) for i in range(len(section.entries))]
    )
    return names + ("".join(parts) or '<p class="note">No probe was scored more than once.</p>')


def heat_maps(section: Section) -> str:
    """IoU of every class under every entry, a table a probe; classes from the most to the least frequent."""
    parts, names = [], section.classes()
    for number, probe in enumerate(section.probes()):
        found = [entry.class_scores(probe) for entry in section.entries]
        heads = ["class", *(Cell(escape(shown_as(entry, probe)), classes="number") for entry in section.entries)]
        rows = []
        for name in names:
            row: list[str | Cell] = [name]
            for scores_of_entry in found:
                value = scores_of_entry.get(name)
                style = "" if value is None else charts.shade(value)
                text = (
                    "-" if value is None else f'<span style="display:block;padding:0 .3em;{style}">{value:.1f}</span>'
                )
                row.append(Cell(text, "" if value is None else value, "heat"))
            rows.append(row)
        table = page.table(heads, rows, name=f"classes-{probe}")
        parts.append(f"<details{' open' * (number == 0)}><summary>IoU, {escape(probe)}</summary>{table}</details>")
    return "".join(parts)


def cluster_tables(section: Section) -> str:
    """Which class each cluster was matched to, of every run."""
    parts = []
    for entry in section.entries:
        for run in entry.runs:
            rows = [
                [page.number(int(row["cluster"]), 0), row["class"] or "-", page.number(int(row["pixels"]), 0),
                 page.number(float(row["share"]) if row["share"] else None)]
                for row in run.table("clusters.csv")
            ]  # fmt: skip
            heads = [Cell("cluster", classes="number"), "class", Cell("pixels", classes="number"),
                     Cell("% of them in the class", classes="number")]  # fmt: skip
            if rows:
                what = f"{escape(entry.label)}, seed {run.metrics['seed']}"
                parts.append(f"<details><summary>{what}</summary>{page.table(heads, rows)}</details>")
    return "".join(parts)


def environment(runs: Sequence[Finished]) -> str:
    """With what and where every run was made."""
    heads = ["run", "seed", "device", "processes", Cell("seconds", classes="number"), "torch", "commit", "command"]
    rows = []
    for run in runs:
        facts = run.environment
        commit = (facts["git_commit"] or "-")[:10] + ("+" if (facts["git_commit"] or "").endswith("+") else "")
        command = Cell(f"<code>{escape(' '.join(facts['command']))}</code>", classes="wide")
        rows.append([
            run.shown, str(facts["seed"]), facts["device"], str(facts["processes"]),
            page.number(facts["seconds"], 0), facts["versions"]["torch"], commit, command,
        ])  # fmt: skip
    versions = sorted({f"{name} {version}" for run in runs for name, version in run.environment["versions"].items()})
    return page.table(heads, rows, name="environment") + f'<p class="note">{escape(", ".join(versions))}</p>'
