"""Levels against labels: best match of regions, nesting, and padding that counts nowhere."""

import torch

from evaluation.hierarchy import LevelAgreement, Nesting, pixel_maps


def test_a_region_takes_the_group_that_covers_it_best():
    """Class 0 fills the left half, class 2 the right; one group has a quarter, one the rest."""
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[:, :, 2:] = 2
    groups = torch.ones_like(label)
    groups[:, :, 0] = 0
    metric = LevelAgreement(3)
    metric.update(groups, label)
    assert float(metric.compute()) == 100 * (8 / 12 + 1 / 2) / 2  # right: 8 of 12; left: 4 of 8, better than 4 of 16
    metric.update(label, label)
    assert abs(float(metric.compute()) - 100 * (8 / 12 + 1 / 2 + 2) / 4) < 1e-9


def test_pixels_without_label_or_group_do_not_count():
    label = torch.tensor([[[0, 0, 255, 7], [0, 1, 1, 1]]])
    groups = torch.tensor([[[0, 0, 0, 1], [-1, 1, 1, -1]]])
    metric = LevelAgreement(2)
    metric.update(groups, label)
    assert float(metric.compute()) == 100
    metric.update(torch.full_like(groups, -1), label)
    assert float(metric.compute()) == 100
    assert int(metric.regions) == 2


def test_nesting_is_100_only_where_no_group_is_cut():
    segments = torch.tensor([[[0, 0, 1, 1], [2, 2, 3, -1]]])
    fine = torch.tensor([[[0, 0, 0, 0], [1, 1, 2, -1]]])
    coarse = torch.tensor([[[1, 1, 1, 1], [0, 0, 0, -1]]])
    metric = Nesting()
    metric.update([segments, fine, coarse])
    assert float(metric.compute()) == 100
    coarse[0, 0, 3] = 0  # one pixel of fine group 0 leaves it, of four
    metric.reset()
    metric.update([segments, fine, coarse])
    assert float(metric.compute()) == 100 * 6 / 7


def test_maps_of_cells_at_pixels():
    valid = torch.ones(1, 4, 6, dtype=torch.bool)
    valid[:, :, 5] = False
    (large,) = pixel_maps([torch.tensor([[[4, 5, 6], [7, 8, 9]]])], valid)
    assert large[0].tolist() == [[4, 4, 5, 5, 6, -1]] * 2 + [[7, 7, 8, 8, 9, -1]] * 2
