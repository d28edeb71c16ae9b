"""Block-wise masks of patches (BEiT, iBOT): a few rectangles instead of scattered cells, which would be guessed."""

import math

import numpy as np

SMALLEST_BLOCK = 4
"""Patches."""
LONGEST = 1 / 0.3
"""Largest ratio of a block's sides."""


def block_masks(
    draw: np.random.Generator, count: int, grid: tuple[int, int], probability: float, share: tuple[float, float]
) -> np.ndarray:
    """bool [count,h,w], true where a patch is hidden.

    A picture is masked with `probability`; a masked one hides a share of its patches that is drawn uniformly from
    `share`, at least one, by rectangles of random place, area and aspect (log-uniform). The last one is cut short, so
    that the number is met exactly. Source: iBOT (ICLR 2022), section 4.1 and its release.
    """
    height, width = grid
    masks = np.zeros((count, height, width), dtype=bool)
    for mask in masks:
        if draw.random() >= probability:
            continue
        wanted = max(1, round(draw.uniform(*share) * height * width))
        left = wanted
        while left > 0:
            area = draw.uniform(min(SMALLEST_BLOCK, left), max(SMALLEST_BLOCK, left))
            aspect = math.exp(draw.uniform(-math.log(LONGEST), math.log(LONGEST)))
            rows = int(np.clip(round(math.sqrt(area * aspect)), 1, height))
            columns = int(np.clip(round(math.sqrt(area / aspect)), 1, width))
            top, start = draw.integers(height - rows + 1), draw.integers(width - columns + 1)
            block = mask[top : top + rows, start : start + columns]
            hidden = np.argwhere(~block)[:left]
            block[hidden[:, 0], hidden[:, 1]] = True
            left -= len(hidden)
    return masks
