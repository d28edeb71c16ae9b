"""A comparison as text: markdown and LaTeX to paste, csv to compute with."""

import csv
from collections.abc import Sequence
from io import StringIO

from evaluation.comparison import Entry, Score, Section, column_name

STAGES = {"val": "Scores of the last step", "best": "Scores of the best checkpoint"}


def labels_used(entry: Entry) -> str:
    """Whether labels were used for training, or to choose the best checkpoint."""
    if entry.first.metrics["uses_labels"]:
        return "training"
    return "choice of best" if entry.first.metrics["selection/uses_labels"] else "none"


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


def facts(entry: Entry) -> list[str]:
    """The cells of a row in front of the scores."""
    metrics = entry.first.metrics
    seeds = " ".join(map(str, entry.seeds))
    return [entry.label, metrics["backbone"], seeds, *length(entry), labels_used(entry)]


HEADS = ["method", "backbone", "seeds", "steps", "batch", "labels"]


def length(entry: Entry) -> list[str]:
    """Steps, and pictures a step over all devices."""
    return [str(entry.first.metrics["steps"]), str(entry.first.config["data.batch_size"])]


def protocol_text(section: Section) -> str:
    """The protocol in one line."""
    return ", ".join(f"{key.removeprefix('protocol/')} {value}" for key, value in section.protocol.items())


def markdown(sections: Sequence[Section], title: str) -> str:
    """Tables to paste into a README or an issue: one a section, the last step before the best checkpoint."""
    lines = [f"# {title}", ""]
    for number, section in enumerate(sections, 1):
        if len(sections) > 1:
            lines += [f"## Protocol {number}", ""]
        lines += [f"- **not comparable with protocol 1**: {text}" for text in section.differs]
        lines += [*[""] * bool(section.differs), f"Protocol: {protocol_text(section)}.", ""]
        for stage, what in STAGES.items():
            columns = section.columns(stage)
            if not columns:
                continue
            ends = ["pictures/s", "peak MiB", "published"] if stage == "val" else []
            heads = [*HEADS, *(column_name(*column) for column in columns), *ends]
            lines += [f"{what}, percent, mean ± standard deviation over the seeds:", "", _row(heads)]
            lines.append("|" + "---|" * len(HEADS) + "---:|" * len(columns) + "---|" * len(ends))
            for entry in section.entries:
                scores = [entry.score(f"{stage}/{probe}/{metric}") for probe, metric in columns]
                cells = [*facts(entry), *("-" if score is None else score.text() for score in scores)]
                cells += [speed_text(entry), memory_text(entry), published_text(entry)] if ends else []
                lines.append(_row(cells))
            lines.append("")
        lines += [f"- {note}" for note in section.notes()]
    return "\n".join(lines).rstrip() + "\n"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def latex(sections: Sequence[Section], title: str) -> str:
    """A table environment a section (needs booktabs): the last step; captions name the protocol and its difference."""
    parts = [f"% {title}; \\usepackage{{booktabs}}"]
    for section in sections:
        columns = section.columns()
        differs = f" Not comparable with the first table: {'; '.join(section.differs)}." if section.differs else ""
        caption = f"{title}: scores of the last step in percent, mean ± standard deviation over the seeds. "
        caption += f"Protocol: {protocol_text(section)}.{differs}"
        parts += [
            "\\begin{table}\n  \\centering",
            f"  \\caption{{{escape(caption)}}}",
            f"  \\begin{{tabular}}{{llrr{'r' * len(columns)}}}\n    \\toprule",
            "    "
            + " & ".join(["method", "seeds", "steps", "batch", *(escape(column_name(*column)) for column in columns)])
            + " \\\\",
            "    \\midrule",
        ]
        tops = {column: best_of(section, f"val/{column[0]}/{column[1]}") for column in columns}
        for entry in section.entries:
            cells = [escape(entry.label), str(len(entry.runs)), *length(entry)]
            for column in columns:
                score = entry.score(f"val/{column[0]}/{column[1]}")
                bold = score is not None and len(section.entries) > 1 and score.mean == tops[column]
                cells.append(_number(score, bold))
            parts.append("    " + " & ".join(cells) + " \\\\")
            if entry.published:
                below = f"\\quad published: {escape(published_text(entry))}"
                parts.append(f"    \\multicolumn{{{4 + len(columns)}}}{{l}}{{{below}}} \\\\")
        parts.append("    \\bottomrule\n  \\end{tabular}\n\\end{table}")
    return "\n".join(parts) + "\n"


def _number(score: Score | None, bold: bool) -> str:
    if score is None:
        return "--"
    mean = f"\\mathbf{{{score.mean:.1f}}}" if bold else f"{score.mean:.1f}"
    return f"${mean}$" if score.spread is None else f"${mean} \\pm {score.spread:.1f}$"


RANKED = ("/acc", "/miou", "/corloc")
"""What is compared with labels. Entropy guards against collapse, and a confidence belongs to its own space of codes."""


def best_of(section: Section, key: str) -> float | None:
    """The highest mean of a metric over the entries of a section; None of one that ranks nothing (see RANKED)."""
    if not key.endswith(RANKED):
        return None
    found = [entry.score(key) for entry in section.entries]
    return max((score.mean for score in found if score is not None), default=None)


def escape(text: str) -> str:
    """A text for LaTeX."""
    special = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "±": "$\\pm$"}
    special |= {char: f"\\{char}" for char in "&%$#_{}"}
    return "".join(special.get(char, char) for char in text).replace("->", "$\\to$")


def as_csv(sections: Sequence[Section]) -> str:
    """A row for every entry, stage and score: section, method, …, mean, standard deviation, number of runs."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["protocol", *HEADS, "stage", "probe", "metric", "mean", "std", "runs", "published"])
    for number, section in enumerate(sections, 1):
        for entry in section.entries:
            for stage in STAGES:
                for probe, metric in section.columns(stage):
                    score = entry.score(f"{stage}/{probe}/{metric}")
                    if score is None:
                        continue
                    spread = "" if score.spread is None else f"{score.spread:.6g}"
                    figure = entry.published.get(f"{probe}/{metric}", "")
                    row = [
                        number,
                        *facts(entry),
                        stage,
                        probe,
                        metric,
                        f"{score.mean:.6g}",
                        spread,
                        score.count,
                        figure,
                    ]
                    writer.writerow(row)
    return buffer.getvalue()
