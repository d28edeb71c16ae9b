"""Raster orders: each visits every pixel once, and a kernel sees no pixel ahead and no blind spot."""

import pytest
import torch

from models.scratch import orders


@pytest.mark.parametrize("order", orders.ORDERS)
def test_an_order_visits_every_pixel_once_and_its_neighbours_in_turn(order):
    places = orders.ranks(order, 3, 5)
    assert sorted(places.tolist()) == list(range(15))
    first = [divmod(int(pixel), 5) for pixel in places.argsort()[:2]]
    assert sum(abs(one - two) for one, two in zip(*first, strict=True)) == 1


def test_the_eight_orders_begin_at_the_four_corners_twice():
    first = [int(orders.ranks(order, 3, 5).argmin()) for order in orders.ORDERS]
    assert sorted(first) == [0, 0, 4, 4, 10, 10, 14, 14]
    assert [first[order - 1] for order in (1, 3, 5, 7)] == [0, 4, 10, 14]
    assert len({tuple(orders.ranks(order, 3, 5).tolist()) for order in orders.ORDERS}) == 8


@pytest.mark.parametrize("order", orders.ORDERS)
def test_a_kernel_sees_all_of_its_window_that_is_not_ahead(order):
    """The window: 2p lines of the past and the pixel's own, p pixels to both sides."""
    mask, (left, right, top, bottom) = orders.kernel_mask(order, 5), orders.padding(order, 5)
    assert mask.sum() == 4 * 5 + 3
    assert sorted((left, right, top, bottom)) == [0, 2, 2, 4]
    assert mask[top, left] == 1  # the pixel itself
    places = orders.ranks(order, 9, 9).reshape(9, 9)
    seen = places[4 - top : 9 - top, 4 - left : 9 - left]
    assert torch.equal(mask > 0, seen <= places[4, 4])


def test_order_0_masks_nothing():
    assert orders.kernel_mask(0, 3).all()
    assert orders.padding(0, 3) == (1, 1, 1, 1)
