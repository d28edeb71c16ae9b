"""Words of commands that look into a checkpoint, read before torch is imported."""

import re

from common.errors import ConfigError

MOST = 36
"""Numbers of clusters tried at most; a longer range is tried at even steps."""


def parse_point(text: str) -> tuple[int, int]:
    """`120,80` -> (120, 80). Raises ConfigError."""
    if not re.fullmatch(r"-?\d+,-?\d+", text):
        raise ConfigError(
            f"point={text}: expected x,y, two whole numbers of pixels from the top left, as in point=120,80"
        )
    x, y = text.split(",")
    return int(x), int(y)


def numbers(text: str) -> list[int]:
    """`6..40` -> the numbers of clusters to try. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 2 <= first < last:
        raise ConfigError(f"sweep={text}: expected a range of numbers of clusters from 2 on, as in sweep=6..40")
    return list(range(first, last + 1, -(-(last - first + 1) // MOST)))
