"""Pictures of several sizes in one padded batch, for what is computed of a whole picture: each without the padding.

Shapes: B pictures padded to H x W px, h x w cells.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Extent:
    """Pictures of a batch that have one size before padding."""

    rows: tuple[int, ...]
    valid: tuple[int, int]
    """Their height and width, px."""
    seen: tuple[int, int]
    """The same in whole patches: what the network would see of one of them alone."""

    def cut(self, images: Tensor) -> Tensor:
        """They out of the batch [B,...,H,W], without the padding that others made necessary."""
        return images[list(self.rows), ..., : self.seen[0], : self.seen[1]]


def own_extents(valid: Tensor, multiple: int) -> list[Extent]:
    """The pictures of a batch by their sizes; valid bool [B,H,W], padded to `multiple` px at the least."""
    rows, columns = (valid.any(axis).sum(1).tolist() for axis in (2, 1))
    groups: dict[tuple[int, int], list[int]] = {}
    for row, sides in enumerate(zip(rows, columns, strict=True)):
        groups.setdefault(sides, []).append(row)
    whole = valid.shape[-2:]
    return [
        Extent(
            tuple(members),
            sides,
            tuple(min(-(-side // multiple) * multiple, most) for side, most in zip(sides, whole, strict=True)),
        )
        for sides, members in groups.items()
    ]


def padded_maps(maps: dict[int, Tensor], extents: list[Extent], size: tuple[int, int]) -> Tensor:
    """Maps [h,w] over what is seen of each picture, by its row, as maps [B,h',w'] over pictures padded to `size`.

    Padding takes the last row and column, so that enlarging makes the same of a picture whatever it is padded to.
    """
    wanted = [1, 1]
    for extent in extents:
        for row in extent.rows:
            for axis in (0, 1):
                cells = maps[row].shape[axis]
                wanted[axis] = max(wanted[axis], cells, round(cells * size[axis] / extent.seen[axis]))
    places = [torch.arange(side, device=maps[0].device) for side in wanted]
    rows = [
        part[places[0].clamp(max=part.shape[0] - 1)][:, places[1].clamp(max=part.shape[1] - 1)]
        for _, part in sorted(maps.items())
    ]
    return torch.stack(rows)
