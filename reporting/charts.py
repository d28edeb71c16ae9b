"""Charts of a page as html and svg: bars with error bars, curves, a heat map. Values are percentages, 0 to 100."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from reporting.page import escape, hexadecimal

STYLE = """
.bars { display: grid; grid-template-columns: minmax(8rem, 18rem) 1fr 6.5rem; gap: .35rem .8rem; align-items: center;
  max-width: 860px; font-size: .92rem; }
.bars .what { overflow-wrap: anywhere; } .bars .value { font-variant-numeric: tabular-nums; }
.track { position: relative; height: 20px; background: var(--shade); border-radius: 3px; }
.track .fill { position: absolute; inset: 0 auto 0 0; border-radius: 3px; }
.track .whisker { position: absolute; top: 9px; height: 2px; background: #1c1e24; }
.track .whisker::before, .track .whisker::after { content: ""; position: absolute; top: -4px; width: 2px; height: 10px;
  background: #1c1e24; }
.track .whisker::before { left: 0; } .track .whisker::after { right: 0; }
.track .published { position: absolute; top: -3px; bottom: -3px; border-left: 2px dashed #b3261e; }
td.heat { text-align: right; }
@media (max-width: 600px) { .bars { grid-template-columns: 1fr 5.6rem; } .bars .what { grid-column: 1 / -1; } }
"""
COLOURS = ((42, 111, 184), (200, 134, 26), (52, 138, 82), (160, 74, 140), (190, 62, 52), (90, 96, 110), (30, 150, 160))
"""Of entries, in order; they begin anew after the last."""


@dataclass(frozen=True)
class Bar:
    """A row of the bars: mean, standard deviation (None: a single run), published figure (None: there is none)."""

    label: str
    mean: float
    spread: float | None = None
    published: float | None = None
    place: int | None = None
    """Of its entry, for the colour; None: that of the row."""


def colour(number: int) -> tuple[int, int, int]:
    """The colour of entry `number`."""
    return COLOURS[number % len(COLOURS)]


def bars(rows: Sequence[Bar]) -> str:
    """Horizontal bars from 0 to the next ten above all of them, with error bars; published figures are dashed lines."""
    reach = max((max(row.mean + (row.spread or 0), row.published or 0) for row in rows), default=0)
    top = max(10, 10 * math.ceil(reach / 10))
    parts = []
    for number, row in enumerate(rows):
        share = 100 / top
        paint = hexadecimal(colour(number if row.place is None else row.place))
        fill = f'<span class="fill" style="width:{row.mean * share:.2f}%;background:{paint}"></span>'
        value = f"{row.mean:.1f}"
        if row.spread is not None:
            low = max(0.0, row.mean - row.spread)
            width = (row.mean + row.spread - low) * share
            fill += f'<span class="whisker" style="left:{low * share:.2f}%;width:{width:.2f}%"></span>'
            value += f" ± {row.spread:.1f}"
        if row.published is not None:
            where = f"left:{row.published * share:.2f}%"
            fill += f'<span class="published" style="{where}" title="published: {row.published:g}"></span>'
        parts.append(
            f'<span class="what">{escape(row.label)}</span><span class="track">{fill}</span>'
            f'<span class="value">{value}</span>'
        )
    return f'<div class="bars" data-top="{top}">{"".join(parts)}</div>'


@dataclass(frozen=True)
class Curve:
    """A line: (step, value) of the mean, and the same of every single run, drawn thin."""

    label: str
    points: Sequence[tuple[int, float]]
    runs: Sequence[Sequence[tuple[int, float]]] = ()


def curves(lines: Sequence[Curve], what: str) -> str:
    """An svg with axes; lines have the colours of their places. `what`: the name of the vertical axis."""
    width, height, left, bottom, top = 640, 300, 46, 38, 14
    everything = [point for line in lines for points in (line.points, *line.runs) for point in points]
    if not everything:
        return '<p class="note">No step was validated before the last one.</p>'
    last = max(step for step, _ in everything)
    high = 10 * math.ceil(max(value for _, value in everything) / 10) or 10
    low = 10 * math.floor(min(value for _, value in everything) / 10)

    def place(step: float, value: float) -> str:
        x = left + (width - left - 12) * step / last
        return f"{x:.1f},{height - bottom - (height - bottom - top) * (value - low) / max(1, high - low):.1f}"

    parts = []
    for value in ticks(low, high):
        y = place(0, value).split(",")[1]
        parts.append(f'<line x1="{left}" x2="{width - 12}" y1="{y}" y2="{y}" stroke="#e4e6ea"/>')
        parts.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in ticks(0, last):
        x = place(step, low).split(",")[0]
        parts.append(f'<text x="{x}" y="{height - bottom + 17}" text-anchor="middle">{step:g}</text>')
    parts.append(f'<text x="{(width + left) / 2:.0f}" y="{height - 4}" text-anchor="middle">step</text>')
    for number, line in enumerate(lines):
        ink = hexadecimal(colour(number))
        for points in line.runs:
            path = " ".join(place(*point) for point in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-opacity=".3" stroke-width="1"/>')
        path = " ".join(place(*point) for point in line.points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{ink}" stroke-width="2.2"/>')
        for step, value in line.points:
            x, y = place(step, value).split(",")
            title = f"{escape(line.label)}: {value:.1f} at step {step}"
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{ink}"><title>{title}</title></circle>')
    return (
        f'<div class="scroll"><svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(what)} against the step" style="min-width:430px" font-size="13" fill="#50545e">'
        f"{''.join(parts)}</svg></div>"
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers from `low` to `high`."""
    span = max(high - low, 1)
    step = 10 ** math.floor(math.log10(span / 4))
    while span / step > 6:
        step *= 2.5 if str(step).lstrip("0.").startswith("2") else 2
    return [low + i * step for i in range(int(span / step + 1e-9) + 1)]


def shade(value: float, top: float = 100.0) -> str:
    """Style of a heat map's cell: from white to a strong blue at `top`; its text stays legible."""
    share = min(1.0, max(0.0, value / top))
    red, green, blue = (round(255 + (end - 255) * share) for end in (24, 84, 150))
    return f"background:#{red:02x}{green:02x}{blue:02x};color:{'#fff' if share > 0.55 else '#1c1e24'}"
