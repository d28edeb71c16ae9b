"""One random patch of each cell of a regular grid (CAUSE, 2023): few patches, spread over the whole picture."""

import torch
from torch import Tensor


def cells(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of whole cells of `side` x `side` patches in a map; what is left at its end is never sampled."""
    return height // side, width // side


def grid_places(order: Tensor, height: int, width: int, side: int) -> Tensor:
    """The flat places of sampled patches, int64 [B,n], n = rows * columns of cells, row by row.

    order: int64 [B,n], in 0..side*side-1: the patch of its cell, row by row within the cell.
    """
    rows, columns = cells(height, width, side)
    cell = torch.arange(rows * columns, device=order.device)
    top, left = cell // columns * side, cell % columns * side
    return (top + order // side) * width + left + order % side


def sampled(maps: Tensor, places: Tensor) -> Tensor:
    """Vectors [B,n,C] of maps [B,C,h,w] at flat places int64 [B,n]; gradient flows."""
    return maps.flatten(2).mT.gather(1, places[:, :, None].expand(-1, -1, maps.shape[1]))
