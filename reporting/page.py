"""Pages of html that open from disk without a network: one file, styles, script and pictures inside."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from common.names import shown

STYLE = """
:root { --ink: #1c1e24; --faint: #6a6e78; --line: #dfe1e6; --paper: #fff; --shade: #f5f6f8; --mark: #2a6fb8; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.2rem 1rem 4rem; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
p { max-width: 75ch; margin: .4rem 0; overflow-wrap: anywhere; }
.lead, .note, figcaption { color: var(--faint); }
.note { font-size: .9rem; }
.differs { border-left: 4px solid #c8861a; background: #fdf6e8; padding: .5rem .8rem; margin: .6rem 0;
  max-width: none; }
code { background: var(--shade); padding: 0 .25em; border-radius: 3px; font-size: .92em; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  white-space: nowrap; }
thead th { background: var(--shade); border-bottom: 2px solid var(--line); }
th.number, td.number { text-align: right; }
th[data-sort] { cursor: pointer; user-select: none; }
th[data-sort]::after { content: " \\2195"; color: #b4b8c2; }
th[aria-sort=ascending]::after { content: " \\2191"; color: var(--mark); }
th[aria-sort=descending]::after { content: " \\2193"; color: var(--mark); }
td.wide { white-space: normal; min-width: 12rem; max-width: 26rem; }
td.best { font-weight: 700; }
.swatch { display: inline-block; width: .95em; height: .95em; border-radius: 3px; vertical-align: -.1em;
  margin-right: .4em; border: 1px solid rgba(0, 0, 0, .18); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem .9rem; font-size: .88rem; margin: .5rem 0; }
.strip { display: flex; flex-wrap: wrap; gap: 4px; }
img { display: block; max-width: 100%; height: auto; }
svg { max-width: 100%; height: auto; display: block; }
details { margin: .4rem 0; } summary { cursor: pointer; }
@media (max-width: 600px) { body { padding: .8rem .6rem 3rem; font-size: 14px; } th, td { padding: .25rem .4rem; } }
"""
SCRIPT = """
document.querySelectorAll("th[data-sort]").forEach(head => {
  const sort = () => {
    const table = head.closest("table"), body = table.tBodies[0], place = head.cellIndex;
    const down = head.getAttribute("aria-sort") !== "descending";
    table.querySelectorAll("th[aria-sort]").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = row => { const cell = row.cells[place];
      return cell.dataset.value === undefined ? cell.textContent.trim() : cell.dataset.value; };
    const compare = (one, two) => {
      const a = value(one), b = value(two);
      if (a === "" || b === "") return (a === "") - (b === "");
      const numbers = !isNaN(a) && !isNaN(b);
      return (down ? -1 : 1) * (numbers ? a - b : a.localeCompare(b));
    };
    [...body.rows].sort(compare).forEach(row => body.append(row));
  };
  head.tabIndex = 0;
  head.addEventListener("click", sort);
  head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
});
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: html as it is, and what the column is sorted by (None: its text, empty cells last)."""

    content: str
    value: float | str | None = None
    classes: str = ""


def escape(text: object) -> str:
    """A text as html, without what a page may not hold or show."""
    return html.escape(shown(text, keep="\n\t"))


def number(value: float | None, digits: int = 1, classes: str = "") -> Cell:
    """A cell with a number, right-aligned; a dash for None, which sorts last."""
    if value is None:
        return Cell("-", "", f"number {classes}".strip())
    return Cell(f"{value:.{digits}f}", value, f"number {classes}".strip())


def picture(image: np.ndarray | Image.Image, alt: str, width: int | None = None, lossless: bool = False) -> str:
    """An <img> that carries a picture (uint8 [H,W,3]) inside: jpeg, or png where `lossless` (id maps)."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer = BytesIO()
    if lossless:
        image.quantize(255).save(buffer, "png", optimize=True) if image.mode == "RGB" else image.save(buffer, "png")
    else:
        image.save(buffer, "jpeg", quality=86)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind = "png" if lossless else "jpeg"
    shown = image.width if width is None else width
    height = round(shown * image.height / image.width)
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}" width="{shown}" height="{height}">'


def swatch(colour: Sequence[int]) -> str:
    """A small square of a colour (red, green, blue 0..255)."""
    return f'<span class="swatch" style="background:{hexadecimal(colour)}"></span>'


def hexadecimal(colour: Sequence[int]) -> str:
    """#rrggbb of red, green, blue 0..255."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def legend(names: Sequence[str], colours: Sequence[Sequence[int]]) -> str:
    """Swatches with names, each pair once."""
    pairs = dict.fromkeys(
        (name, tuple(int(part) for part in colour)) for name, colour in zip(names, colours, strict=True)
    )
    entries = "".join(f"<span>{swatch(colour)}{escape(name)}</span>" for name, colour in pairs)
    return f'<div class="legend">{entries}</div>'


def table(
    heads: Sequence[str | Cell], rows: Sequence[Sequence[str | Cell]], sortable: bool = True, name: str = ""
) -> str:
    """A table that scrolls by itself on a narrow screen; a click on a head sorts by it. Plain texts are escaped."""
    lines = ["".join(_cell("th", head, ' data-sort=""' if sortable else "") for head in heads)]
    body = "".join(f"<tr>{''.join(_cell('td', cell) for cell in row)}</tr>\n" for row in rows)
    mark = f' id="{escape(name)}"' if name else ""
    return f'<div class="scroll"><table{mark}><thead><tr>{lines[0]}</tr></thead><tbody>\n{body}</tbody></table></div>'


def _cell(tag: str, cell: str | Cell, more: str = "") -> str:
    if not isinstance(cell, Cell):
        cell = Cell(escape(cell))
    classes = f' class="{cell.classes}"' if cell.classes else ""
    value = "" if cell.value is None else f' data-value="{escape(cell.value)}"'
    return f"<{tag}{classes}{value}{more}>{cell.content}</{tag}>"


def document(title: str, body: str, style: str = "") -> str:
    """The whole page. `body`: html; `style`: further rules."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n"
        f"<body>\n{body}\n<script>{SCRIPT}</script>\n</body></html>\n"
    )
