"""A comparison as text: markdown and LaTeX to paste, csv to compute with."""

import csv
import re
from collections.abc import Sequence
from io import StringIO
from typing import Any

from common.names import shown
from evaluation import headline
from reporting import published
from reporting.comparison import FEW, SCORE, Entry, Score, Section, column_name
from reporting.published import Cited

STAGES = {"val": "Scores of the last step", "best": "Scores of the best checkpoint"}


def scores_of(section: Section, stage: str) -> str:
    """What the scores of a stage are of. Rows that evaluate `best.ckpt` have theirs under `val`, too."""
    best = all(run.read_from.name == "best.ckpt" for entry in section.entries for run in entry.runs)
    return STAGES["best" if best else stage]


def labels_used(entry: Entry, stage: str = "val") -> str:
    """What labels were used for: training, or the choice of the checkpoint whose scores these are."""
    metrics = entry.first.metrics
    chosen = metrics["selection/uses_labels"] and (stage == "best" or entry.first.read_from.name == "best.ckpt")
    return ", ".join(["training"] * metrics["uses_labels"] + ["choice of best"] * chosen) or "none"


def published_text(entry: Entry) -> str:
    """`cluster_crf 57.2 acc / 24.6 mIoU (HP, CVPR 2023)`; empty where the recipe is not the published one."""
    probes: dict[str, list[str]] = {}
    for key, value in entry.published.items():
        probe, metric = key.split("/")
        probes.setdefault(probe, []).append(f"{value:g} {'mIoU' if metric == 'miou' else metric}")
    figures = ", ".join(f"{probe} {' / '.join(values)}" for probe, values in probes.items())
    return f"{figures} ({entry.source})" if figures else ""


def memory_text(entry: Entry) -> str:
    """Highest peak memory of its runs, MiB, and where."""
    peaks = [run.memory for run in entry.runs if run.memory is not None]
    return "-" if not peaks else f"{max(value for _, value in peaks):.0f} {peaks[0][0]}"


def speed_text(entry: Entry) -> str:
    """Training pictures per second."""
    speed = entry.score("train_images_per_second")
    return "-" if speed is None else f"{speed.mean:.1f}"


def facts(entry: Entry, stage: str = "val") -> list[str]:
    """The cells of a row in front of the scores."""
    metrics = entry.first.metrics
    seeds = " ".join(map(str, entry.seeds))
    return [entry.label, metrics["backbone"], seeds, *length(entry), labels_used(entry, stage)]


HEADS = ["method", "backbone", "seeds", "steps", "batch", "labels"]


def length(entry: Entry) -> list[str]:
    """Steps (of checkpoints that differ in them from the first to the last), and pictures a step over all devices."""
    steps = sorted({run.metrics["steps"] for run in entry.runs})
    return [" to ".join(map(str, dict.fromkeys([steps[0], steps[-1]]))), str(entry.first.config["data.batch_size"])]


def told(section: Section) -> dict[str, Any]:
    """The protocol without keys that ask for nothing (`data.label_values {}`)."""
    own = {key.removeprefix("protocol/"): value for key, value in section.protocol.items()}
    return {key: value for key, value in own.items() if value not in ASKS_NOTHING}


def protocol_text(section: Section) -> str:
    """The protocol in one line."""
    return ", ".join(f"{key} {value}" for key, value in told(section).items())


ASKS_NOTHING = (None, "", "auto", {}, [])
"""Values of keys that leave everything to the data."""


def markdown(sections: Sequence[Section], title: str, cited: Sequence[Cited] = ()) -> str:
    """Tables to paste into a README or an issue: one a section, the last step before the best checkpoint, and published
    rows below them."""
    lines = [f"# {title}", ""]
    for number, section in enumerate(sections, 1):
        if len(sections) > 1:
            lines += [f"## Protocol {number}", ""]
        lines += [f"- **not comparable with protocol 1**: {text}" for text in section.differs]
        lines += [*[""] * bool(section.differs), f"Protocol: {protocol_text(section)}.", ""]
        for stage in STAGES:
            columns = section.columns(stage)
            if not columns:
                continue
            speed, figures = stage == "val", stage == section.beside
            ends = ["pictures/s", "peak MiB"] * speed + ["published"] * figures
            of = ["score of"] * (columns[0][0] == SCORE)
            heads = [*HEADS, *of, *(column_name(*column) for column in columns), *ends]
            what = f"{scores_of(section, stage)}, percent, mean ± standard deviation from three seeds on:"
            lines += [what, "", _row(heads)]
            lines.append("|" + "---|" * len(HEADS + of) + "---:|" * len(columns) + "---|" * len(ends))
            for entry in section.entries:
                scores = [entry.cell(stage, *column) for column in columns]
                cells = [*facts(entry, stage), *[entry.headline] * len(of)]
                cells += ["-" if score is None else score.text() for score in scores]
                cells += [speed_text(entry), memory_text(entry)] if speed else []
                cells += [published_text(entry)] * figures
                lines.append(_row(cells))
            lines.append("")
        lines += [f"- {note}" for note in section.notes()]
    return "\n".join(map(harmless, lines)).rstrip() + "\n" + published.markdown(cited)


def harmless(line: str) -> str:
    """A line of markdown whose texts come from other people's files: no html in it, no picture that is loaded."""
    return shown(line).replace("<", "&lt;").replace("![", "!\\[")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex(sections: Sequence[Section], title: str, cited: Sequence[Cited] = ()) -> str:
    """A table environment a section (needs booktabs): the last step, or the best checkpoint where published figures
    stand beside it; captions name which, the protocol and its difference."""
    label = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "comparison"
    parts = [f"% {without_paths(title)}; \\usepackage{{booktabs}}"]
    for number, section in enumerate(sections, 1):
        stage = section.beside if section.published else "val"
        columns = section.columns(stage)
        groups = list(dict.fromkeys(probe for probe, _ in columns))
        of = ["read from"] * (groups[:1] == [SCORE])
        heads = ["method", *of, "$n$", "steps", "batch"]
        sizes = {probe: sum(column[0] == probe for column in columns) for probe in groups}
        above = [f"\\multicolumn{{{size}}}{{c}}{{{escape(readable(probe))}}}" for probe, size in sizes.items()]
        starts = [1 + len(heads) + sum(list(sizes.values())[:i]) for i in range(len(groups))]
        rules = [f"\\cmidrule(lr){{{i}-{i + size - 1}}}" for i, size in zip(starts, sizes.values(), strict=True)]
        parts += [
            "\\begin{table}\n  \\centering",
            f"  \\caption{{{escape(caption(section, stage))}}}",
            f"  \\label{{tab:{label}{f'-{number}' if number > 1 else ''}}}",
            f"  \\begin{{tabular}}{{ll{'l' * len(of)}rr{'r' * len(columns)}}}\n    \\toprule",
            "    " + " & ".join([*[""] * len(heads), *above]).strip() + " \\\\",
            "    " + " ".join(rules),
            "    " + " & ".join([*heads, *(headline.SHOWN[metric] for _, metric in columns)]) + " \\\\",
            "    \\midrule",
        ]
        ahead = {column: section.ahead(stage, *column) for column in columns}
        for entry in section.entries:
            cells = [escape(entry.title), *[escape(readable(entry.headline))] * len(of)]
            cells += [str(len(entry.runs)), *length(entry)]
            cells += [_number(entry.cell(stage, *column), ahead[column] is entry) for column in columns]
            parts.append("    " + " & ".join(cells) + " \\\\")
            if entry.published:
                below = f"\\quad published: {escape(published_text(entry))}"
                parts.append(f"    \\multicolumn{{{len(heads) + len(columns)}}}{{l}}{{{below}}} \\\\")
        parts.append("    \\bottomrule\n  \\end{tabular}\n\\end{table}")
    return "\n".join(parts) + "\n" + published.latex(cited, escape)


def caption(section: Section, stage: str = "val") -> str:
    """What the table shows, in words, without the places of any files."""
    datas = dict.fromkeys(run.metrics["data"] for entry in section.entries for run in entry.runs)
    backbones = dict.fromkeys(run.metrics["backbone"] for entry in section.entries for run in entry.runs)
    kept = {key: value for key, value in told(section).items() if key not in LEFT_OUT}
    protocol = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in kept.items())
    text = (
        f"Unsupervised segmentation on {', '.join(datas)} with {', '.join(backbones)}: "
        f"{scores_of(section, stage).lower()} in percent, mean of n seeds, ± standard deviation where n is at least "
        f"{FEW}. Bold: ahead of all others by more than both standard deviations together. Protocol: {protocol}."
    )
    if section.differs:
        text += f" Not comparable with the first table: {'; '.join(section.differs)}."
    return without_paths(text)


LEFT_OUT = ("data.name", "data.root", "data.lists", "data.train_roots")
"""Of a protocol in a caption, which names the data already and is no place for those of files."""
READABLE = {"cluster": "online clusters", "kmeans": "k-means", "own": "own classes", "linear": "linear probe",
            "linear_posthoc": "linear probe, post hoc", "fcn": "FCN probe", "score": "score"}  # fmt: skip


def readable(probe: str) -> str:
    """A probe in words."""
    name = probe.removesuffix("_crf")
    return READABLE.get(name, name.replace("_", " ")) + (" + CRF" if name != probe else "")


def without_paths(text: str) -> str:
    """A text in which a path is its last part alone."""
    return re.sub(r"[^\s,;:()'\"]*/(?:[^\s,;:()'\"]*/)*([^\s/,;:()'\"]+)/?", r"\1", text)


def _number(score: Score | None, bold: bool) -> str:
    if score is None:
        return "--"
    mean = f"\\mathbf{{{score.mean:.1f}}}" if bold else f"{score.mean:.1f}"
    return f"${mean}$" if score.spread is None else f"${mean} \\pm {score.spread:.1f}$"


def escape(text: str) -> str:
    """A text for LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    special |= {char: f"\\{char}" for char in "&%$#_{}"}
    return "".join(special.get(char, char) for char in text).replace("->", "$\\to$")


CITED = ["data", "published protocol", "source", "caution"]
"""Columns of the csv that only published rows fill."""


def as_csv(sections: Sequence[Section], cited: Sequence[Cited] = ()) -> str:
    """A row for every entry, stage and score: section, method, …, mean, standard deviation, number of runs.

    Published rows have `cited` in place of a protocol's number, and with them there are the columns of CITED.
    """
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol", *HEADS, "headline", "stage", "probe", "metric", "mean", "std", "runs", "published",
                     *CITED * bool(cited)])  # fmt: skip
    for number, section in enumerate(sections, 1):
        for entry in section.entries:
            for stage in STAGES:
                for probe, metric in section.scored(stage):
                    score = entry.score(f"{stage}/{probe}/{metric}")
                    if score is None:
                        continue
                    spread = "" if score.spread is None else f"{score.spread:.6g}"
                    figure = entry.published.get(f"{probe}/{metric}", "") if stage == section.beside else ""
                    row = [
                        number,
                        *facts(entry, stage),
                        entry.headline,
                        stage,
                        probe,
                        metric,
                        f"{score.mean:.6g}",
                        spread,
                        score.count,
                        figure,
                    ]
                    writer.writerow([*row, *[""] * len(CITED) * bool(cited)])
    for row in cited:
        for name, figure in row.figures().items():
            probe, _, metric = name.rpartition(" ") if name.endswith((" acc", " mIoU")) else ("", "", name)
            mean, _, spread = figure.partition(" ± ")
            score = ["", "cited", probe, metric.replace("mIoU", "miou"), mean, spread]
            length_and_labels = [""] * (len(HEADS) - 2)
            told = [row.data, row.protocol, row.source, row.caution]
            writer.writerow(["cited", row.method, row.backbone, *length_and_labels, *score, "", "", *told])
    return buffer.getvalue()
