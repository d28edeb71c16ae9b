"""Sliding windows: published counts, borders that are reached, and what is refused."""

import pytest

from common.errors import ConfigError
from grouping.windows import crop_boxes


@pytest.mark.parametrize(
    ("size", "scales", "counts"),
    [
        ((80, 80), (0.5, 0.4, 0.3, 0.2), [9, 16, 36, 81]),
        ((80, 160), (0.5, 0.4, 0.3, 0.2), [21, 36, 78, 171]),
        ((160, 80), (0.5, 0.4, 0.3, 0.2), [21, 36, 78, 171]),
        ((80, 80), (0.6, 0.5, 0.4, 0.3), [9, 9, 16, 36]),
    ],
)
def test_counts_at_the_published_grids(size, scales, counts):
    boxes, found = crop_boxes(*size, scales)
    assert found == counts
    assert len(boxes.unique(dim=0)) == sum(counts)
    assert int(boxes.min()) == 0
    assert boxes[:, 2].max() == size[0] - 1
    assert boxes[:, 3].max() == size[1] - 1


def test_a_window_of_an_odd_side_is_as_wide_as_said():
    boxes, _ = crop_boxes(12, 12, (0.45,))
    assert ((boxes[:, 2:] - boxes[:, :2]) == 4).all()


@pytest.mark.parametrize("scale", [0.1, 0.0, 1.2])
def test_a_scale_without_a_window_is_refused(scale):
    with pytest.raises(ConfigError) as caught:
        crop_boxes(6, 8, (scale,))
    assert str(caught.value) == (
        f"method.crops.scales: {scale:g} of 6 patches is no window; give shares above 0.17, at most 1"
    )
