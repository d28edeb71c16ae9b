"""Pages that open from disk without a network: one file a page, from the templates beside this file.

Python hands over data, `templates/` holds what it looks like: a template a page, macros for what pages share, rules and
scripts as files of their own, which a page carries inside.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from PIL import Image

from common.names import shown

TEMPLATES = Path(__file__).resolve().parent / "templates"


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, and what the column is sorted by (None: its text, empty cells last)."""

    text: str
    value: float | str | None = None
    classes: str = ""


@dataclass(frozen=True)
class Table:
    """Heads and rows of a table, and the name by which it is found on the page."""

    heads: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    name: str = ""


@dataclass(frozen=True)
class Picture:
    """A picture that a page carries inside: its data as an address, and how large it is shown, px."""

    address: str
    alt: str
    width: int
    height: int


def render(template: str, **data: Any) -> str:
    """A page from a file in `templates/`. Every text of `data` comes out as text, whatever it holds."""
    return ENVIRONMENT.get_template(template).render(data)


def harmless(value: Any) -> Any:
    """A value to put on a page, a text without what a page may not hold or show; markup of templates as it is."""
    return shown(value, keep="\n\t") if isinstance(value, str | Path) and not isinstance(value, Markup) else value


def inlined(name: str) -> Markup:
    """A file of `templates/` as it is: rules or a script."""
    return Markup((TEMPLATES / name).read_text("utf-8"))


def number(value: float | None, digits: int = 1, classes: str = "") -> Cell:
    """A cell with a number, right-aligned; a dash for None, which sorts last."""
    if value is None:
        return Cell("-", "", f"number {classes}".strip())
    return Cell(f"{value:.{digits}f}", value, f"number {classes}".strip())


def numeric(text: str) -> Cell:
    """The head of a column of numbers."""
    return Cell(text, classes="number")


def picture(image: np.ndarray | Image.Image, alt: str, width: int | None = None, lossless: bool = False) -> Picture:
    """A picture (uint8 [H,W,3] or an image) to carry inside a page: jpeg, webp where it lets the paper through (RGBA),
    or png where `lossless` (id maps)."""
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    buffer, kind = BytesIO(), "png" if lossless else "webp" if image.mode == "RGBA" else "jpeg"
    if lossless:
        image.quantize(255).save(buffer, kind, optimize=True) if image.mode == "RGB" else image.save(buffer, kind)
    else:
        image.save(buffer, kind, quality=86)
    data = base64.b64encode(buffer.getvalue()).decode()
    wide = image.width if width is None else width
    return Picture(f"data:image/{kind};base64,{data}", alt, wide, round(wide * image.height / image.width))


def hexadecimal(colour: Sequence[int]) -> str:
    """#rrggbb of red, green, blue 0..255."""
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def legend(names: Sequence[str], colours: Sequence[Sequence[int]]) -> list[tuple[str, str]]:
    """Names with their colours (#rrggbb), each pair once."""
    return list(dict.fromkeys((name, hexadecimal(colour)) for name, colour in zip(names, colours, strict=True)))


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(TEMPLATES),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=harmless,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals["inlined"] = inlined
ENVIRONMENT.filters["hexadecimal"] = hexadecimal
