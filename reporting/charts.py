"""Where the marks of a page's charts stand: bars with error bars, and curves. Values are percentages, 0 to 100.

`templates/charts.html.j2` draws them; an entry has the colour of its place in `templates/charts.css`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bar:
    """A row of the bars: mean, standard deviation (None: a single run), published figure (None: there is none)."""

    label: str
    mean: float
    spread: float | None = None
    published: float | None = None
    place: int | None = None
    """Of its entry, for the colour; None: that of the row."""


@dataclass(frozen=True)
class Drawn:
    """A row of the bars as it is drawn: text of its value, and lengths in percent of the track."""

    label: str
    value: str
    place: int
    fill: float
    whisker: tuple[float, float] | None
    """Left end and width of the error bar."""
    published: tuple[float, float] | None
    """Where the published figure stands, and the figure."""


@dataclass(frozen=True)
class Bars:
    """All rows, and the value at the right end of the track."""

    top: int
    rows: Sequence[Drawn]


def bars(rows: Sequence[Bar]) -> Bars:
    """Horizontal bars from 0 to the next ten above all of them, with error bars; published figures are dashed lines."""
    reach = max((max(row.mean + (row.spread or 0), row.published or 0) for row in rows), default=0)
    top = max(10, 10 * math.ceil(reach / 10))
    share = 100 / top
    drawn = []
    for number, row in enumerate(rows):
        value, whisker = f"{row.mean:.1f}", None
        if row.spread is not None:
            low = max(0.0, row.mean - row.spread)
            whisker = low * share, (row.mean + row.spread - low) * share
            value += f" ± {row.spread:.1f}"
        published = None if row.published is None else (row.published * share, row.published)
        place = number if row.place is None else row.place
        drawn.append(Drawn(row.label, value, place, row.mean * share, whisker, published))
    return Bars(top, drawn)


@dataclass(frozen=True)
class Curve:
    """A line: (step, value) of the mean, and the same of every single run, drawn thin."""

    label: str
    points: Sequence[tuple[int, float]]
    runs: Sequence[Sequence[tuple[int, float]]] = ()


Spot = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn: spots (x, y) in px, and what each of its own points says."""

    label: str
    spots: Sequence[Spot]
    points: Sequence[tuple[int, float]]
    runs: Sequence[Sequence[Spot]]


@dataclass(frozen=True)
class Plot:
    """Axes with their marks (place in px, value) and lines, in a frame of `width` x `height` px."""

    what: str
    """Name of the vertical axis."""
    width: int
    height: int
    left: int
    right: int
    bottom: int
    values: Sequence[Spot]
    steps: Sequence[Spot]
    lines: Sequence[Line]


def curves(lines: Sequence[Curve], what: str) -> Plot:
    """Lines with axes; lines have the colours of their places. `what`: the name of the vertical axis. One line at least
    has a point."""
    width, height, left, bottom, top = 640, 300, 46, 38, 14
    everything = [point for line in lines for points in (line.points, *line.runs) for point in points]
    last = max(step for step, _ in everything)
    high = 10 * math.ceil(max(value for _, value in everything) / 10) or 10
    low = 10 * math.floor(min(value for _, value in everything) / 10)

    def place(step: float, value: float) -> Spot:
        x = left + (width - left - 12) * step / last
        return x, height - bottom - (height - bottom - top) * (value - low) / max(1, high - low)

    drawn = [
        Line(
            line.label,
            [place(*point) for point in line.points],
            line.points,
            [[place(*point) for point in points] for points in line.runs],
        )
        for line in lines
    ]
    values = [(place(0, value)[1], value) for value in ticks(low, high)]
    steps = [(place(step, low)[0], step) for step in ticks(0, last)]
    return Plot(what, width, height, left, width - 12, height - bottom, values, steps, drawn)


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from `low` to `high`."""
    span = max(high - low, 1)
    step = 10 ** math.floor(math.log10(span / 4))
    while span / step > 6:
        step *= 2.5 if str(step).lstrip("0.").startswith("2") else 2
    return [low + i * step for i in range(int(span / step + 1e-9) + 1)]
