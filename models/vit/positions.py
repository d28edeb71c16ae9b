"""Position embeddings of vision transformers on another grid than the one they were trained on.

Two rules are in use and they differ by several percent, so training and probing must keep to one: `dino` is the rule
of the DINO release, which also served DINOv2 without registers; `timm` is the rule of timm, equal to DINOv2 with
registers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import one_of

RULES = ("dino", "timm")
DINO_OFFSET = 0.1
"""Patches that DINO adds to the wanted grid before it divides: a guard against rounding; it stretches the grid."""


def resample(embedding: Tensor, base: tuple[int, int], grid: tuple[int, int], prefix: int, rule: str) -> Tensor:
    """The embedding on another grid: [1, prefix + h0*w0, D] -> [1, prefix + h*w, D], same type; prefix rows untouched.

    Args:
        embedding: rows of the prefix tokens first, then the grid, row-major.
        base: (h0, w0), the grid of `embedding` in patches.
        grid: (h, w), the wanted grid in patches. Equal to `base`: the embedding itself comes back.
        prefix: rows that belong to no patch (class token, registers).
        rule: `dino`: bicubic by the scale factors (h + 0.1) / h0 and (w + 0.1) / w0, which also set the coordinates, no
            antialias (interpolate_pos_encoding of the DINO release). `timm`: bicubic to the exact size, antialiased.

    Raises:
        ConfigError: unknown rule.
        ValueError: `embedding` does not have prefix + h0*w0 rows.
    """
    one_of("backbone.pos_interp", rule, RULES)
    if embedding.shape[1] != prefix + base[0] * base[1]:
        raise ValueError(f"{embedding.shape[1]} rows are not {prefix} prefix rows and a grid of {base[0]} x {base[1]}")
    exporting = torch.compiler.is_exporting()  # the grid is then a symbol, which no branch may look at
    if not exporting and tuple(grid) == tuple(base):
        return embedding
    kept, patches = embedding[:, :prefix], embedding[:, prefix:]
    maps = patches.float().unflatten(1, tuple(base)).permute(0, 3, 1, 2)
    if rule == "dino" and exporting:
        maps = _by_matrices(maps, grid)
    elif rule == "dino":
        scale = tuple((wanted + DINO_OFFSET) / had for wanted, had in zip(grid, base, strict=True))
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([kept, maps.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)


def _by_matrices(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The rule `dino` for a program whose grid is not known when it is made: [1,D,h0,w0] -> [1,D,h,w].

    F.interpolate wants its scale factors as numbers; bicubic interpolation is a matrix along each axis. Equal up to
    rounding, and the embedding itself on its own grid.
    """
    places = [torch.arange(side, device=maps.device, dtype=torch.float32) for side in grid]
    counts = [place[-1] + 1 for place in places]
    same = (counts[0] == maps.shape[2]) & (counts[1] == maps.shape[3])
    rows, columns = (
        cubic_matrix(place, torch.where(same, 1.0, (count + DINO_OFFSET) / had), had)
        for place, count, had in zip(places, counts, maps.shape[2:], strict=True)
    )
    return rows @ maps @ columns.T


def cubic_matrix(places: Tensor, scale: Tensor, had: int) -> Tensor:
    """[n,had]: weights of the source entries for places [n] of an axis enlarged by `scale` (align_corners False).

    Cubic convolution (Keys 1981) with a = -0.75, as torch has it; beyond the ends the last entry is repeated.
    """
    a = -0.75
    source = (places + 0.5) / scale - 0.5
    first = source.floor()
    t = source - first
    far, near = ((a * (d - 5) * d + 8 * a) * d - 4 * a for d in (t + 1, 2 - t)), (t, 1 - t)
    before, after = far
    inner = [((a + 2) * d - (a + 3)) * d * d + 1 for d in near]
    entries = torch.arange(had, device=places.device)
    matrix = torch.zeros(1, had, device=places.device)
    for shift, weight in zip((-1, 0, 1, 2), (before, *inner, after), strict=True):
        at = (first + shift).clamp(0, had - 1)
        matrix = matrix + weight[:, None] * (at[:, None] == entries)
    return matrix


def square_grid(rows: int, prefixes: tuple[int, ...]) -> tuple[int, int] | None:
    """(prefix, side) of an embedding of `rows` rows whose grid is square, by the first prefix that fits, or None."""
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return prefix, side
    return None
