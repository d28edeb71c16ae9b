"""What `predict` says about all pictures together: areas, an overview, and a page of all overlays with their names."""

import csv
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np

from common.files import whole
from common.spec import ClassMeta
from inference.naming import Colour, Legend
from reporting import page, panels

SHOWN = 8
"""Pictures of the overview."""
NAMED = 1.0
"""Percent of a picture from which on a class is named below it; all of them stand in areas.csv."""


@dataclass(frozen=True)
class Measured:
    """A picture: name of its results, its file, and the pixels of each class."""

    name: str
    file: str
    height: int
    width: int
    pixels: list[int]


class Areas:
    """Pixels of every class (clusters of one name together) in every picture."""

    def __init__(self, legend: Legend) -> None:
        self.classes = legend.classes()
        self.clusters = len(legend.names)
        self.rows: list[Measured] = []

    def add(self, name: str, file: str, ids: np.ndarray) -> list[int]:
        """One picture's ids [H,W]: `name` of its results, `file` in the folder. Returns the pixels of each class."""
        counts = sum(np.bincount(band.ravel(), minlength=self.clusters) for band in np.array_split(ids, 16))
        own = [int(counts[numbers].sum()) for numbers in self.classes.values()]
        self.rows.append(Measured(name, file, *ids.shape, own))
        return own

    def save(self, path: Path) -> None:
        """A row a picture: its file, height and width, the pixels of each class, then percent of the picture."""
        with whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.writer(handle, lineterminator="\n")
            writer.writerow(["picture", "height", "width", *self.classes, *(f"{name} %" for name in self.classes)])
            for row in self.rows:
                share = [f"{100 * count / (row.height * row.width):.2f}" for count in row.pixels]
                writer.writerow([row.file, row.height, row.width, *row.pixels, *share])


def present(legend: Legend, pixels: list[int]) -> tuple[list[tuple[Colour, str]], int]:
    """(colour, `sky (41 %)`) of the classes that cover NAMED percent of a picture or more, the largest first; and how
    many others are in it. `pixels`: of each of `legend.classes()`."""
    total = max(1, sum(pixels))
    found = sorted(zip(pixels, legend.classes().items(), strict=True), key=lambda item: -item[0])
    named = [
        (legend.colours[ids[0]], f"{name} ({100 * count / total:.0f} %)")
        for count, (name, ids) in found
        if 100 * count >= NAMED * total
    ]
    return named, sum(count > 0 for count in pixels) - len(named)


class Overview:
    """Some pictures beside their segments and overlays on one sheet, the names of their classes below each."""

    def __init__(self, legend: Legend, pictures: int, alpha: float) -> None:
        self.legend = legend
        self.colours = np.array(legend.colours, dtype=np.uint8).reshape(-1, 3)
        self.joined = legend.joined()
        self.alpha = alpha
        self.every = max(1, pictures // SHOWN)
        self.rows: list[panels.Row] = []

    def add(self, number: int, name: str, picture: np.ndarray, ids: np.ndarray, pixels: list[int]) -> None:
        """Take picture `number` of the folder, where it is one of those that are shown."""
        if number % self.every or len(self.rows) >= SHOWN:
            return
        step = max(1, min(ids.shape) // 400)
        small, seen = self.joined[ids[::step, ::step]], np.ascontiguousarray(picture[::step, ::step])
        maps = {"segments": self.colours[small], "overlay": panels.overlay(seen, small, self.colours, self.alpha)}
        named, others = present(self.legend, pixels)
        if others:
            named.append((None, f"{others} more below {NAMED:g} %"))
        self.rows.append(panels.Row(seen, maps, None, name, tuple(named)))

    def save(self, path: Path) -> None:
        """The sheet."""
        panels.save(path, self.rows, ClassMeta())


def overlays_page(title: str, legend: Legend, areas: Areas, probe: str, checkpoint: Path) -> str:
    """A page that stands beside `overlay/`: every overlay, as it is there, with the classes in it and their shares."""
    cards = []
    for row in areas.rows:
        named, others = present(legend, row.pixels)
        chips = [(text, page.hexadecimal(colour)) for colour, text in named]
        cards.append({"link": f"overlay/{quote(row.name)}.png", "picture": row, "named": chips, "others": others})
    classes = legend.classes()
    return page.render(
        "overlays.html.j2",
        title=f"Segments of {title}",
        clusters=len(legend.names),
        probe=probe,
        checkpoint=None if legend.source is not None else checkpoint,
        classes=page.legend(list(classes), [legend.colours[ids[0]] for ids in classes.values()]),
        cards=cards,
        least=NAMED,
    )
