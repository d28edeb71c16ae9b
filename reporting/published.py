"""Figures that papers publish (configs/published.csv): the page of all of them, and those of a data set as cited rows.

`python -m reporting.published` writes docs/published.md. Imports no torch.
"""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import config
from common.errors import ConfigError, did_you_mean
from common.files import write_text

FILE = config.CONFIGS / "published.csv"
PAGE = config.CONFIGS.parent / "docs" / "published.md"
COLUMNS = {"cluster_acc": "cluster acc", "cluster_miou": "cluster mIoU", "linear_acc": "linear acc",
           "linear_miou": "linear mIoU"}  # fmt: skip
"""Columns of the file that hold a score in percent, with their names in tables."""
SAID = "Cited from publications, not measured here: no row of a ranking, and bold marks none of them."

INTRODUCTION = """\
# What papers report

Scores as papers and their authors' posters and talks print them, in percent, by data set. They stand in
`configs/published.csv`; this page is written from it by `make published`.

**These tables are no ranking.** Two numbers can be compared where they were measured in the same way: the same
pictures at the same size, the same classes, the same rule that gives clusters their class, the same clean-up behind
the prediction. All of that together is called a *protocol*, and publications differ in it, mostly without a word beside
the number. On COCO-Stuff, 15 stuff classes and 27 merged classes are two different tasks; 50 % of one says nothing
about 50 % of the other. A score after a CRF (a filter that moves borders to edges of the picture) is some percent above
the same score without. A method on a larger backbone gains from the backbone. So the same method has different numbers
in different tables, and each row below says where its number is from.

How to read a row:

- **cluster**: the labels were used for one thing alone, to say which cluster is which class. **linear**: one layer was
  trained *with labels* on the method's features; it says what the features hold, not what the method finds by itself.
- **acc** is the share of pixels that have the right class; **mIoU** is the overlap of prediction and truth, averaged
  over classes, so that small classes count as much as large ones. A number behind ± is a standard deviation.
- **protocol** is as much as is known; what a source does not say (sizes, CRF, which pictures) is not guessed here.
- **caution** is what one must know before quoting the row.

Runs of your own are put beside the rows of a data set with `make compare RUNS="runs/a runs/b" PUBLISHED=cocostuff27`:
the cited rows stand below the measured ones in a table of their own. What is measured here under the settings of a
publication, and how it differs from them, stands with the recipes (`make list`).
"""


@dataclass(frozen=True)
class Cited:
    """A published row."""

    data: str
    method: str
    backbone: str
    scores: dict[str, str]
    """Column of the file -> the number as it is printed, with its deviation where it has one."""
    further: dict[str, str]
    """Other scores, by their names."""
    protocol: str
    source: str
    caution: str

    def figures(self) -> dict[str, str]:
        """All scores by their names in tables."""
        return {COLUMNS[name]: value for name, value in self.scores.items()} | self.further


@cache
def rows() -> tuple[Cited, ...]:
    """Every published row, in the order of the file."""
    with FILE.open(newline="", encoding="utf-8") as handle:
        return tuple(cited(row) for row in csv.DictReader(handle))


def cited(row: dict[str, str]) -> Cited:
    """A row of the file."""
    scores = {name: row[name] for name in COLUMNS if row[name]}
    pairs = [entry.partition("=") for entry in row["other"].split(";") if entry]
    further = {name.replace("_", " ").replace("miou", "mIoU"): value for name, _, value in pairs}
    return Cited(
        row["data"], row["method"], row["backbone"], scores, further, row["protocol"], row["source"], row["caution"]
    )


def data_sets() -> list[str]:
    """Names of the data sets that have published rows."""
    return list(dict.fromkeys(row.data for row in rows()))


def of(names: str) -> list[Cited]:
    """The rows of data sets, named with spaces between them. Raises ConfigError for one that has none."""
    asked = list(dict.fromkeys(names.split()))
    if not asked:
        raise ConfigError(f"published: names no data set; those with published rows: {', '.join(data_sets())}")
    for name in asked:
        if name not in data_sets():
            raise ConfigError(
                f"published={name}: no published row of such a data set; {did_you_mean(name, data_sets())} "
                f"(there are {', '.join(data_sets())})"
            )
    return [row for name in asked for row in rows() if row.data == name]


def table(found: Sequence[Cited]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of rows of one data set; columns in which no row has anything to say are left out."""
    names = list(dict.fromkeys(name for row in found for name in row.figures()))
    names.sort(key=lambda name: list(COLUMNS.values()).index(name) if name in COLUMNS.values() else len(COLUMNS))
    heads = ["method", "backbone", *names, "protocol", "source", "caution"]
    cells = [
        [row.method, row.backbone, *(row.figures().get(name, "") for name in names), row.protocol, row.source,
         row.caution]
        for row in found
    ]  # fmt: skip
    kept = [place for place in range(len(heads)) if any(row[place] for row in cells)]
    return [heads[place] for place in kept], [[row[place] or "-" for place in kept] for row in cells]


def by_data(found: Sequence[Cited]) -> dict[str, list[Cited]]:
    """The rows of each data set."""
    return {name: [row for row in found if row.data == name] for name in dict.fromkeys(row.data for row in found)}


def markdown_table(found: Sequence[Cited], mark: str = "") -> list[str]:
    """The lines of a table of markdown; `mark`: stands in front of each row, under a head without a name."""
    heads, cells = table(found)
    rights = ["---:|" if re.search(r"acc|IoU|AP|classes", head) else "---|" for head in heads]
    first = ["", *heads] if mark else heads
    lines = [f"| {' | '.join(first)} |", "|" + "---|" * bool(mark) + "".join(rights)]
    return lines + [f"| {' | '.join([mark, *row] if mark else row)} |" for row in cells]


def markdown(found: Sequence[Cited]) -> str:
    """What stands below the tables of a comparison; empty without rows."""
    lines = []
    for name, own in by_data(found).items():
        lines += ["", f"## Cited: {name}", "", SAID, "", *markdown_table(own, "cited")]
    return "\n".join([*lines, ""]) if lines else ""


def latex(found: Sequence[Cited], escape: Callable[[str], str]) -> str:
    """A table environment a data set, in grey; `escape`: makes a text harmless for LaTeX."""
    parts = []
    for name, own in by_data(found).items():
        heads, cells = table(own)
        kept = [place for place, head in enumerate(heads) if head not in ("protocol", "caution")]
        notes = "; ".join(dict.fromkeys(": ".join(filter(None, [row.protocol, row.caution])) for row in own))
        body = [" & ".join(["cited", *(escape(row[place]) for place in kept)]) + " \\\\" for row in cells]
        parts.append(
            "\\begin{table}\n  \\centering\\color{gray}\n"
            f"  \\caption{{{escape(f'Cited on {name}. {SAID} Protocols: {notes}.')}}}\n"
            f"  \\label{{tab:cited-{name}}}\n"
            f"  \\begin{{tabular}}{{{'l' * (len(kept) + 1)}}}\n    \\toprule\n"
            f"    {' & '.join(['', *(escape(heads[place]) for place in kept)])} \\\\\n    \\midrule\n"
            + "".join(f"    {line}\n" for line in body)
            + "    \\bottomrule\n  \\end{tabular}\n\\end{table}"
        )
    return "% cited rows are grey: \\usepackage{xcolor}\n" + "\n".join(parts) + "\n" if parts else ""


def page() -> str:
    """docs/published.md."""
    parts = [INTRODUCTION]
    for name, own in by_data(rows()).items():
        parts.append("\n".join([f"## {name}", "", *markdown_table(own), ""]))
    return "\n".join(parts)


def main() -> None:
    """Write the page."""
    write_text(PAGE, page())


if __name__ == "__main__":
    main()
