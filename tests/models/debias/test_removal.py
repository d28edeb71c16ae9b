"""What tells places is taken out, and what tells content stays."""

import pytest
import torch
from torch.nn import functional as F

from models.debias import removal

CHANNELS, SIDE = 384, 8


def scenes(count, strength, seed=0, channels=CHANNELS):
    """Maps [B,C,h,w] of random content plus one pattern of places, and the content."""
    draws = torch.Generator().manual_seed(seed)
    content = F.normalize(torch.randn(count, channels, SIDE, SIDE, generator=draws), dim=1)
    axes = torch.linalg.qr(torch.randn(channels, 3, generator=torch.Generator().manual_seed(9)))[0]
    row, column = removal.coordinates(SIDE, SIDE).T
    places = torch.stack([row - 0.5, column - 0.5, (row - 0.5) * (column - 0.5)])
    pattern = (axes @ places).unflatten(1, (SIDE, SIDE))
    return content + strength * pattern, content, strength * pattern


def test_the_basis_of_a_black_picture_is_a_projector_of_the_number_asked_for():
    _, _, pattern = scenes(1, 1.0)
    for components in (1, 3):
        basis = removal.blank_basis(pattern + 0.3, components)
        projector = basis @ basis.T
        torch.testing.assert_close(projector @ projector, projector)
        assert projector.trace() == pytest.approx(components, rel=1e-5)


def test_without_a_number_it_is_the_fewest_that_hold_the_energy():
    draws = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(CHANNELS, 8, generator=draws))[0]
    fall = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.1, 0.1, 0.1, 0.1])
    maps = (axes * fall) @ torch.linalg.qr(torch.randn(100, 8, generator=draws))[0].T + 3 * axes[:, :1]
    unit = F.normalize(maps, dim=0)
    values = torch.linalg.svdvals(unit - unit.mean(1, keepdim=True)).square()
    wanted = int((values.cumsum(0) / values.sum() < removal.ENERGY).sum()) + 1
    basis = removal.blank_basis(maps.unflatten(1, (10, 10)))
    assert basis.shape == (CHANNELS, CHANNELS // removal.SHARE)
    assert 1 < wanted < basis.shape[1]
    assert (basis.norm(dim=0) > 0).sum() == wanted


def test_the_blank_basis_takes_the_pattern_and_keeps_the_content():
    maps, content, pattern = scenes(6, 0.8)
    kept = removal.without(maps, removal.blank_basis(pattern + 0.2, 3))
    torch.testing.assert_close(kept.norm(dim=1), torch.ones(6, SIDE, SIDE))
    assert F.cosine_similarity(kept, content).mean() > 0.99
    assert F.cosine_similarity(maps, content).min() < 0.85


def test_planes_that_are_fitted_to_places_take_them_and_keep_the_content():
    maps, content, _ = scenes(80, 0.8, channels=96)
    places = removal.coordinates(SIDE, SIDE).repeat(80, 1)
    rows = F.normalize(maps, dim=1).movedim(1, -1).flatten(0, 2)
    planes = removal.fitted_planes(rows, places, 2)
    left = removal.without_planes(rows, planes)
    assert removal.told(rows, places) > 0.8
    assert removal.told(left, places) < 0.05
    kept = F.cosine_similarity(left, content.movedim(1, -1).flatten(0, 2))
    assert kept.mean() > 0.97
    assert kept.mean() > F.cosine_similarity(rows, content.movedim(1, -1).flatten(0, 2)).mean() + 0.03
    assert torch.equal(removal.fitted_planes(rows, places, 2), planes)


def test_a_later_plane_takes_what_earlier_ones_left():
    maps, _, _ = scenes(30, 0.6, channels=96)
    places = removal.coordinates(SIDE, SIDE).repeat(30, 1)
    rows = F.normalize(maps, dim=1).movedim(1, -1).flatten(0, 2)
    planes = removal.fitted_planes(rows, places, 3)
    losses = [removal.position_loss(removal.without_planes(rows, planes[:n]), planes[n], places) for n in range(3)]
    assert losses[0] < losses[1] <= losses[2] + 1e-4
    spread = (places - places.mean(0)).square().mean()
    assert losses[0] < 0.5 * spread


def test_what_is_taken_lies_in_the_plane_and_nothing_of_it_is_left():
    draws = torch.Generator().manual_seed(2)
    patches, pair = torch.randn(5, 7, generator=draws), torch.randn(2, 7, generator=draws)
    axes = removal.orthonormal(pair)
    torch.testing.assert_close(axes @ axes.T, torch.eye(2))
    assert F.cosine_similarity(axes[0], pair[0], dim=0) == pytest.approx(1)
    left = removal.without_planes(patches, pair[None])
    torch.testing.assert_close(left @ pair.T, torch.zeros(5, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(left + removal.on_plane(patches, pair), patches)
