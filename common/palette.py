"""Colours that can be told apart, for classes and clusters without colours of their own."""

from functools import lru_cache

import numpy as np

LINEAR_TO_CONE = np.array([[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.6300]])
CONE_TO_OKLAB = np.array([[0.2105, 0.7936, -0.0041], [1.9780, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]])
FIRST = (52, 120, 190)


@lru_cache(maxsize=16)
def default_palette(n: int) -> tuple[tuple[int, int, int], ...]:
    """n RGB colours 0..255, each as far as possible from those before it; neither greys nor glaring colours.

    Greedy farthest points in OKLab (Ottosson 2020) over a grid of RGB, so a shorter palette is the start of a longer
    one. Colours repeat after about two thousand.
    """
    grid = np.stack(np.meshgrid(*[np.linspace(0, 255, 22).round()] * 3, indexing="ij"), -1).reshape(-1, 3)
    lab = oklab(grid)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    usable = (lab[:, 0] > 0.38) & (lab[:, 0] < 0.87) & (chroma > 0.095) & (chroma < 0.175)
    grid, lab = grid[usable], lab[usable] * [0.7, 1.0, 1.0]
    start = int(np.abs(grid - FIRST).sum(1).argmin())
    chosen, distance = [start], np.linalg.norm(lab - lab[start], axis=1)
    while len(chosen) < min(n, len(grid)):
        chosen.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return tuple(tuple(int(value) for value in grid[chosen[i % len(chosen)]]) for i in range(n))


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0..255 [n,3] -> OKLab [n,3], where distances are about as large as they look."""
    value = rgb / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    return np.cbrt(linear @ LINEAR_TO_CONE.T) @ CONE_TO_OKLAB.T
