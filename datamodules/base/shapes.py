"""Pictures too large, or too long and thin, to be seen as a whole: told from their size, before memory is taken."""

from pathlib import Path
from typing import Any

from datamodules.base.transforms import NATIVE, Geometry, both_sides, five_crop_boxes, resized_size
from datamodules.files.reading import WindowsOnlyError

MOST = 16
"""Times the usual number of pixels (`data.train_size`, `data.eval_size` or `predict.size`, squared) that a picture may
have when it is resized."""


def resized(geometry: Geometry, height: int, width: int) -> tuple[int, int]:
    """(height, width) of a picture of this size when it is resized, before anything is cut off."""
    if geometry.crop == "five":
        _, _, height, width = five_crop_boxes(height, width, geometry.five_crop_ratio)[0].tolist()
        return resized_size(height, width, geometry.size, "center")
    return resized_size(height, width, geometry.size, geometry.crop)


def usual(geometry: Geometry, height: int, width: int) -> int:
    """Pixels of a square picture in this geometry; of one that is not resized, those of its shorter side squared."""
    if geometry.crop == NATIVE:
        return min(height, width) ** 2
    rows, columns = both_sides(geometry.size)
    return rows * columns


def is_long(geometry: Geometry, height: int, width: int) -> bool:
    """True for a picture of more than `MOST` times the usual pixels: so long that its shorter side says little."""
    rows, columns = resized(geometry, height, width)
    return rows * columns > MOST * usual(geometry, height, width)


def expect_whole(file: str | Path, size: tuple[int, int], geometry: Geometry) -> None:
    """Raises WindowsOnlyError for a picture of `size` (height, width) that is too long and thin for a geometry."""
    if is_long(geometry, *size):
        raise WindowsOnlyError(
            file,
            f"{size[1]}x{size[0]} pixels (width x height) are so long and thin that they would have more than {MOST} "
            "times the usual number of patches",
        )


def file_of(source: Any, index: int) -> str:
    """The file of a picture for messages, or its id where a source keeps no files."""
    entries = getattr(source, "entries", None)
    return source.id(index) if entries is None else entries[index].picture
