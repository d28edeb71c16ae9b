"""Masks of a picture: overlaps, merging by hand, painting."""

import pytest
import torch

from models.detection import merging


def strips(*columns, width=10):
    masks = torch.zeros(len(columns), 2, width, dtype=torch.bool)
    for mask, (first, last) in zip(masks, columns, strict=True):
        mask[:, first:last] = True
    return masks


def test_overlaps_of_each_with_each():
    found = merging.overlaps(strips((0, 4), (0, 0)), strips((2, 6), (0, 4), (0, 0)))
    assert found.tolist() == [[pytest.approx(1 / 3), 1, 0], [0, 0, 0]]


def test_old_masks_stay_where_no_sure_new_one_covers_them():
    old, new = strips((0, 4), (5, 9)), strips((0, 4), (5, 9), (0, 2))
    found = merging.merge(old, new, torch.tensor([0.9, 0.69, 0.7]), sure=0.7)
    assert found.new.tolist() == [0, 2]
    assert found.old.tolist() == [1]
    half = merging.merge(strips((0, 4)), strips((0, 2)), torch.ones(1), sure=0.5)
    assert half.old.tolist() == []  # half is covered: not below the overlap
    none = merging.merge(old, new, torch.zeros(3), sure=0.7)
    assert none.new.tolist() == []
    assert none.old.tolist() == [0, 1]


def test_the_surest_mask_is_painted_on_top():
    ids = merging.paint(strips((0, 6), (4, 8)), torch.tensor([0.2, 0.9]))
    assert ids[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert merging.paint(strips(), torch.zeros(0)).shape == (2, 10)
