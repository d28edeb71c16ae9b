"""Palettes of label files: where they differ, an index may mean another class in each file."""

import logging
from pathlib import Path

import numpy as np

from datamodules.files.opening import opened

log = logging.getLogger(__name__)


def say(labels: list[str]) -> None:
    """Name the first two label files whose palettes give one index, used in both, different colours."""
    first: tuple[str, list[int]] | None = None
    for path in labels:
        palette = colours(path)
        if palette is None:
            continue
        if first is None:
            first = path, palette
        elif differing(first[1], palette):
            shared = used(first[0]) & used(path) & set(differing(first[1], palette))
            if shared:
                index = min(shared)
                log.warning(
                    "%s and %s: their palettes differ (index %d is the colour %s in one and %s in the other), and the "
                    "index is what is read as class id, not the colour; if colours are the classes, save the labels "
                    "with one palette, or as grey",
                    first[0], path, index, _colour(first[1], index), _colour(palette, index),
                )  # fmt: skip
                return


def colours(path: str | Path) -> list[int] | None:
    """Red, green, blue of every index, from the first bytes of a file; None for a file without a palette."""
    try:
        with opened(path) as image:
            return image.getpalette("RGB") if image.mode == "P" else None
    except Exception:  # named when it is read
        return None


def differing(one: list[int], other: list[int]) -> list[int]:
    """Indices of both palettes that have different colours."""
    return [i for i in range(min(len(one), len(other)) // 3) if one[3 * i : 3 * i + 3] != other[3 * i : 3 * i + 3]]


def used(path: str | Path) -> set[int]:
    """The indices that a palette file holds; none where it cannot be read."""
    try:
        with opened(path) as image:
            image.load()
            return set(np.unique(np.asarray(image)).tolist())
    except Exception:
        return set()


def _colour(palette: list[int], index: int) -> str:
    return "#" + "".join(f"{part:02x}" for part in palette[3 * index : 3 * index + 3])
