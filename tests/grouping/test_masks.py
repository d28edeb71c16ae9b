"""Components, boxes and backgrounds of small maps, by hand and against floods."""

import pytest
import torch

from common.errors import ConfigError
from grouping import masks


def grid(*rows):
    return torch.tensor([[int(cell) for cell in row.replace(".", "0")] for row in rows])


def flood(mask, connectivity):
    """Components by flooding, numbered in raster order."""
    height, width = mask.shape
    found, count = torch.zeros(height, width, dtype=torch.int64), 0
    for start in mask.nonzero().tolist():
        if found[tuple(start)]:
            continue
        count += 1
        queue = [start]
        while queue:
            y, x = queue.pop()
            if not (0 <= y < height and 0 <= x < width) or found[y, x] or not mask[y, x]:
                continue
            found[y, x] = count
            steps = [(0, 1), (1, 0), (0, -1), (-1, 0)]
            steps += [(1, 1), (1, -1), (-1, 1), (-1, -1)] if connectivity == 8 else []
            queue += [[y + dy, x + dx] for dy, dx in steps]
    return found


@pytest.mark.parametrize("connectivity", [4, 8])
def test_components_are_floods(connectivity):
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        mask = torch.rand(9, 13, generator=generator) < 0.5
        found = masks.components(mask, connectivity)
        assert torch.equal(found, flood(mask, connectivity))
        sizes = found.flatten().bincount()[1:]
        assert torch.equal(masks.largest_component(mask, connectivity), found == sizes.argmax() + 1)
        place = int(mask.flatten().nonzero()[-1])
        assert torch.equal(masks.component_at(mask, place, connectivity), found == found.flatten()[place])
        assert not masks.component_at(mask, int((~mask).flatten().nonzero()[0]), connectivity).any()


def test_an_empty_mask_has_nothing():
    empty = torch.zeros(3, 4, dtype=torch.bool)
    assert not masks.largest_component(empty, 8).any()
    assert masks.tight_box(empty, 16).tolist() == [0, 0, 0, 0]


def test_another_connectivity():
    with pytest.raises(ConfigError) as caught:
        masks.components(torch.ones(2, 2, dtype=torch.bool), 6)
    assert str(caught.value) == "connectivity=6: not one of 4, 8"


def test_boxes_are_clipped_to_the_picture():
    mask = grid("....", ".11.", "..11") > 0
    assert masks.tight_box(mask).tolist() == [1, 1, 4, 3]
    assert masks.tight_box(mask, 8, (20, 30)).tolist() == [8, 8, 30, 20]


def test_the_background_is_the_label_of_most_of_the_border():
    labels = grid("2221", "2001", "2111")
    names, shares = masks.border_shares(labels)
    assert names.tolist() == [0, 1, 2]
    assert shares.tolist() == [0.0, 7 / 14, 7 / 14]  # corners twice
    assert masks.background_first(labels).tolist() == grid("2220", "2110", "2000").tolist()  # the first of equals
    assert masks.background_first(grid("33", "33")).tolist() == [[0, 0], [0, 0]]


def test_regions_grow_after_what_erosion_leaves():
    labels = grid("........", ".1111...", ".1111...", ".1111...", ".......2", "........")
    names, boxes = masks.region_boxes(labels, erode=1, dilate=1)
    assert names.tolist() == [1, 2]
    assert boxes.tolist() == [[1, 1, 5, 4], [6, 3, 8, 6]]  # 2 is one patch: its erosion is left out
    assert masks.region_boxes(labels, erode=2, dilate=0)[1].tolist() == [[2, 2, 4, 3], [7, 4, 8, 5]]
    assert masks.region_boxes(labels, erode=0, dilate=0)[1].tolist() == [[1, 1, 5, 4], [7, 4, 8, 5]]
    corner = grid("11..", "11..", "....")
    assert masks.region_boxes(corner, erode=1, dilate=0)[1].tolist() == [[0, 0, 1, 1]]  # outside counts as inside
    names, boxes = masks.region_boxes(torch.zeros(3, 3, dtype=torch.int64))
    assert (names.tolist(), tuple(boxes.shape)) == ([], (0, 4))


def test_specks_are_taken_out_of_each_mask():
    both = torch.stack([grid("1100", "0010", "0000", "1001"), grid("1001", "0000", "0000", "1100")]) > 0
    assert masks.without_specks(both, 3).int().tolist() == [
        grid("1100", "0010", "0000", "0000").tolist(), grid("0000", "0000", "0000", "0000").tolist()
    ]  # fmt: skip
    assert masks.without_specks(both, 3, connectivity=4).sum() == 0
    assert masks.without_specks(both, 2)[1].int().tolist() == grid("0000", "0000", "0000", "1100").tolist()
    assert torch.equal(masks.without_specks(both, 1), both)
