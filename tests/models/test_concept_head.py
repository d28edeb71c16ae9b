"""The transformer head: masks act where they say, maps of other sizes resize the table of positions."""

import pytest
import torch

from models.concept_head import PLACES, ConceptTransformer

SHAPES = {
    "self_attention": (2, 12, 12), "cross_attention": (2, 12, 12), "hidden": (2, 12, 7),
    "linear": (2, 6, 3, 4), "nonlinear": (2, 6, 3, 4), "residual1": (2, 12, 6), "residual2": (2, 12, 6),
    "residual3": (2, 12, 6),
}  # fmt: skip


@pytest.fixture
def parts():
    torch.manual_seed(0)
    return ConceptTransformer(6, 5, (3, 4), hidden=7), torch.randn(2, 6, 3, 4), torch.randn(2, 12, 6)


def test_masks_of_ones_are_none(parts):
    head, features, queries = parts
    ones = {place: torch.ones(SHAPES[place]) for place in PLACES}
    torch.testing.assert_close(head(features, queries, ones), head(features, queries))


@pytest.mark.parametrize("place", PLACES)
def test_a_mask_acts_at_its_place(parts, place):
    head, features, queries = parts
    mask = torch.ones(SHAPES[place])
    mask[1] = 2 * torch.rand(SHAPES[place][1:])
    codes, plain = head(features, queries, {place: mask}), head(features, queries)
    torch.testing.assert_close(codes[0], plain[0])
    assert not torch.allclose(codes[1], plain[1], atol=1e-4)


def test_maps_of_other_sizes_resize_the_positions(parts):
    head, _, _ = parts
    codes = head(torch.randn(1, 6, 5, 7), torch.randn(1, 35, 6))
    assert codes.shape == (1, 5, 5, 7)
    codes.sum().backward()
    assert head.positions.grad.abs().sum() > 0
    with torch.no_grad():
        head.positions.copy_(torch.ones(12, 6) * 3)
    torch.testing.assert_close(head.positions_for((5, 7)), torch.full((35, 6), 3.0))
    assert head.positions_for((3, 4)) is head.positions
