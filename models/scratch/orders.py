"""The eight raster orders of a picture, and what each means for a convolution: ranks, kernel masks, padding.

An order visits every pixel once, line by line. `by` says what a line is, `down` and `right` which way rows and columns
run. Order 0 is no order: every pixel sees every other. Numbers as in the reproduction (Ouali et al., ECCV 2020).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Order:
    """One way to read a picture; `by` is "rows" where lines are rows, else "columns"."""

    by: str
    down: bool
    right: bool

    def places(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Line and place within the line, both growing with time, of pixels at these rows and columns."""
        row, column = (rows if self.down else -rows), (columns if self.right else -columns)
        return (row, column) if self.by == "rows" else (column, row)


ORDERS = {
    1: Order("rows", down=True, right=True),
    2: Order("columns", down=True, right=True),
    3: Order("rows", down=True, right=False),
    4: Order("columns", down=True, right=False),
    5: Order("columns", down=False, right=True),
    6: Order("rows", down=False, right=True),
    7: Order("rows", down=False, right=False),
    8: Order("columns", down=False, right=False),
}


def ranks(order: int, height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Place of each pixel in an order, from 0: int64 [H*W], pixels row by row. `order` is one of ORDERS."""
    rows, columns = grid(range(height), range(width), device)
    line, place = ORDERS[order].places(rows, columns)
    length = width if ORDERS[order].by == "rows" else height
    return ((line - line.min()) * length + place - place.min()).flatten()


def padding(order: int, kernel: int) -> tuple[int, int, int, int]:
    """Pixels to pad on the left, right, top and bottom, so that a kernel of odd side F sees F - 1 lines of the past,
    its own line and none of the future. In order 0 the kernel is centred."""
    reach, half = kernel - 1, kernel // 2
    if order == 0:
        return (half,) * 4
    found = ORDERS[order]
    if found.by == "rows":
        return (half, half, reach, 0) if found.down else (half, half, 0, reach)
    return (reach, 0, half, half) if found.right else (0, reach, half, half)


def kernel_mask(order: int, kernel: int) -> Tensor:
    """Taps [F,F] of a kernel under `padding` that lie at the pixel itself or before it: float32, 1 or 0."""
    left, _, top, _ = padding(order, kernel)
    rows, columns = grid(range(-top, kernel - top), range(-left, kernel - left))
    if order == 0:
        return torch.ones_like(rows).float()
    line, place = ORDERS[order].places(rows, columns)
    return ((line < 0) | ((line == 0) & (place <= 0))).float()


def grid(rows: range, columns: range, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Row and column number at each place of a grid: two int64 [H,W]."""
    found = (torch.arange(side.start, side.stop, device=device) for side in (rows, columns))
    return torch.meshgrid(*found, indexing="ij")
