"""Cluster-based foreground extraction by hand: precision over pictures, the threshold, the cut that labels choose."""

import pytest
import torch

from common.errors import ConfigError
from evaluation.overclustering import foreground


def maps(*rows):
    return [torch.tensor(row) for row in rows]


CLUSTERS = maps([[0, 0, 1, 1]], [[1, 1, 1, 2], [2, 2, 2, 2]])
MASKS = maps([[False, True, True, True]], [[True, True, False, False], [False, False, False, True]])


def test_precision_is_a_mean_over_the_pictures_that_show_the_cluster():
    found = foreground.precisions(CLUSTERS, MASKS, 4)
    assert found.tolist() == pytest.approx([0.5, (1 + 2 / 3) / 2, 0.2, 0])


def test_foreground_begins_at_the_threshold():
    precision = torch.tensor([0.5, 0.9, 0.2, 0.49], dtype=torch.float64)
    assert foreground.above(precision, 0.5).tolist() == [0, 1]
    assert foreground.above(precision, 0.95).tolist() == []
    assert foreground.above(precision, 0).tolist() == [2, 3, 0, 1]


@pytest.mark.parametrize(("boundary", "iou"), [("foreground", 2 / 3), ("background", 1 / 3), ("out", 1 / 2)])
def test_pixels_without_a_label(boundary, iou):
    mask, label = maps([[True, True, False, False]]), maps([[255, 3, 4, 0]])
    assert foreground.overlap(mask, label, [3, 4], boundary) == pytest.approx(iou)
    assert foreground.overlap(maps([[False]]), maps([[0]]), [3], boundary) == 1
    with pytest.raises(ConfigError, match="boundary=edge: not one of foreground, background, out"):
        foreground.overlap(mask, label, [3], "edge")


def test_labels_choose_the_cut_where_the_objects_begin():
    """Ten clusters of equal size whose precision is their id; objects are from 7 on."""
    ids = [torch.arange(10)[None]]
    precision = torch.arange(10).double() / 10
    truth = [(torch.arange(10) >= 6).long()[None]]
    found = foreground.cuts(ids, truth, [1], precision)
    assert [start for _, start, _ in found] == [5, 6]
    assert found[-1] == (pytest.approx(0.6), 6, 1.0)
    assert foreground.chosen(found) == pytest.approx(0.6)
    assert foreground.chosen([(0.33, 5, 0.5)]) == pytest.approx(0.35)
    assert foreground.chosen([(1.0, 5, 0.5)]) == pytest.approx(0.95)
