"""A comparison in a terminal: its scores, in tables as narrow as a terminal; the rest is in its files."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from common.names import shown
from reporting.comparison import SCORE, Section, column_name
from reporting.comparison_tables import STAGES, protocol_text, scores_of


def lines(sections: Sequence[Section]) -> Iterator[Text | Table]:
    """What is said of each section, and its tables: the last step before the best checkpoint."""
    for section in sections:
        yield from (Text(f"not comparable with the first table: {text}") for text in section.differs)
        yield Text(shown(f"Protocol: {protocol_text(section)}."))
        yield from (table(section, stage) for stage in STAGES if section.columns(stage))
        yield from (Text(shown(note)) for note in section.notes())


def table(section: Section, stage: str) -> Table:
    """The scores of a stage, a row an entry; bold where it is ahead of all others."""
    columns = section.columns(stage)
    mixed = columns[0][0] == SCORE
    title = f"{scores_of(section, stage)}, percent, mean ± standard deviation from three seeds on"
    found = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.add_column("method", overflow="fold")
    for _ in range(mixed):
        found.add_column("score\nof", overflow="fold")
    for column in columns:
        found.add_column(column_name(*column).replace(" ", "\n"), justify="right")
    ahead = {column: section.ahead(stage, *column) for column in columns}
    for entry in section.entries:
        cells = [Text(shown(entry.label)), *[Text(entry.headline)] * mixed]
        for column in columns:
            score = entry.cell(stage, *column)
            text = "-" if score is None else score.text()
            cells.append(Text(text, style="bold" if ahead[column] is entry else ""))
        found.add_row(*cells)
    return found
