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
    if tuple(grid) == tuple(base):
        return embedding
    kept, patches = embedding[:, :prefix], embedding[:, prefix:]
    maps = patches.float().unflatten(1, tuple(base)).permute(0, 3, 1, 2)
    if rule == "dino":
        scale = tuple((wanted + DINO_OFFSET) / had for wanted, had in zip(grid, base, strict=True))
        maps = F.interpolate(maps, scale_factor=scale, mode="bicubic", align_corners=False)
    else:
        maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([kept, maps.flatten(2).transpose(1, 2).to(embedding.dtype)], dim=1)


def square_grid(rows: int, prefixes: tuple[int, ...]) -> tuple[int, int] | None:
    """(prefix, side) of an embedding of `rows` rows whose grid is square, by the first prefix that fits, or None."""
    for prefix in prefixes:
        side = math.isqrt(max(rows - prefix, 0))
        if side and side * side == rows - prefix:
            return prefix, side
    return None
