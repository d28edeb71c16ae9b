"""Segments as nodes of their picture, all views together: what clustering transformers and graphs over segments take.

Source: HSG (CVPR 2022). Shapes: B pictures of V views, n pixels, R rows of a table of
segments, M nodes, D dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from grouping.segments import segment_means, segment_sizes, slot_table, take


@dataclass(frozen=True)
class Nodes:
    """The segments of B pictures, at most M of each."""

    vectors: Tensor
    """[B,M,D] prototypes, with gradient; zero on padding."""
    positions: Tensor
    """[B,M,D] mean position of the pixels, with gradient; zero on padding."""
    views: Tensor
    """int64 [B,M], view 0..V-1 of each node; 0 on padding."""
    table: Tensor
    """int64 [B,M], the row of each node in the table of segments; -1 on padding."""
    rows: int
    """R."""

    @property
    def padding(self) -> Tensor:
        """bool [B,M], true where a slot holds no node."""
        return self.table < 0

    @property
    def hidden(self) -> Tensor:
        """As `padding`, but a picture without any segment has one node at zero: attention over nothing is undefined."""
        padding = self.padding
        first = torch.arange(padding.shape[1], device=padding.device) == 0
        return padding & ~(padding.all(1, keepdim=True) & first)

    def of_segments(self, values: Tensor) -> Tensor:
        """Values of nodes, int64 [B,M], for the rows of the table of segments: [R]; -1 where a row is no node."""
        rows = self.table.where(~self.padding, self.rows).flatten()
        return values.new_full((self.rows + 1,), -1).scatter_(0, rows, values.flatten())[: self.rows]


def picture_nodes(
    prototypes: Tensor,
    ids: Tensor,
    counts: Tensor,
    positions: Tensor,
    views: int,
    slots: int | None,
    fill: bool = False,
) -> Nodes:
    """The segments of every picture as its nodes, in the order of their ids. Waits for the device once.

    Args:
        prototypes: [R,D] of this rank's segments; rows beyond them are padding.
        ids: int64 [n], segment of each pixel of the B*V views in turn; -1 for pixels that do not count.
        counts: int64 [B*V], segments of each view.
        positions: [n/(B*V),D], position of each pixel of a view.
        views: V.
        slots: nodes of a picture at most: of more segments the largest stay, the others are no nodes (the release
            fails). None: as many as the picture with most segments has.
        fill: M is `slots` whatever pictures have, as released for COCO; else what the picture with most segments needs.
    """
    pictures, rows = len(counts) // views, len(prototypes)
    width = slots
    if slots is None or not fill:
        largest = max(1, int(counts.view(pictures, views).sum(1).max()))
        width = largest if slots is None else min(slots, largest)
    last = counts.cumsum(0)
    view = torch.searchsorted(last, torch.arange(rows, device=ids.device), right=True)
    owners = (view // views).where(view < len(counts), -1)
    table = slot_table(owners, pictures, width, segment_sizes(ids, rows))
    places = segment_means(positions.repeat(len(counts), 1), ids, rows)
    return Nodes(take(prototypes, table), take(places, table), take(view % views, table), table, rows)
