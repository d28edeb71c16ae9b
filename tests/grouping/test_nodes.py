"""Segments as nodes: which segment stands where, with what vector, position and view."""

import torch
import torch.nn.functional as F

from grouping.nodes import picture_nodes
from grouping.segments import prototypes

IDS = torch.tensor([0, 0, 1, -1, 2, 2, 2, 3, -1, -1, -1, -1, 4, -1, 4, 4])
"""Four views of four pixels: segments 0, 1 | 2, 3 | none | 4."""
COUNTS = torch.tensor([2, 2, 0, 1])


def nodes(slots=None, fill=False, rows=6):
    draw = torch.Generator().manual_seed(0)
    pixels = F.normalize(torch.randn(16, 3, generator=draw), dim=1)
    places = torch.rand(4, 2, generator=draw)
    own = prototypes(pixels, IDS, rows)
    return picture_nodes(own, IDS, COUNTS, places, 2, slots, fill), own, places


def test_all_views_of_a_picture_stand_together():
    found, own, places = nodes()
    assert found.table.tolist() == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert found.views.tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    assert torch.equal(found.vectors[0], own[:4])
    assert found.vectors[1, 1:].abs().max() == 0
    torch.testing.assert_close(found.positions[0, 0], places[:2].mean(0))
    torch.testing.assert_close(found.positions[1, 0], places[[0, 2, 3]].mean(0))
    labels = torch.tensor([[5, 6, 7, 8], [9, 1, 1, 1]])
    assert found.of_segments(labels).tolist() == [5, 6, 7, 8, 9, -1]


def test_of_more_segments_than_slots_the_largest_stay():
    found, _, _ = nodes(slots=2)
    assert found.table.tolist() == [[0, 2], [4, -1]]
    assert found.of_segments(torch.tensor([[1, 2], [3, 0]])).tolist() == [1, -1, 2, -1, 3, -1]


def test_slots_are_filled_up_where_asked():
    assert nodes(slots=7, fill=True)[0].padding.sum(1).tolist() == [3, 6]
    assert nodes(slots=7)[0].padding.sum(1).tolist() == [0, 3]


def test_a_picture_without_segments_attends_to_one_node_at_zero():
    empty = picture_nodes(torch.zeros(1, 3), torch.full((8,), -1), torch.tensor([0, 0]), torch.rand(4, 2), 2, None)
    assert empty.padding.tolist() == [[True]]
    assert empty.hidden.tolist() == [[False]]
    assert nodes()[0].hidden.tolist() == nodes()[0].padding.tolist()
