"""Pairs of places: where they lie, what is cut out there, and that a draw belongs to a step and a picture."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from lightning_modules.patch_pairs import places

DRAWS = {"eight": places.draw_directions(8), "nine": places.draw_directions(9), "adjacency": places.draw_adjacency}
SIZES = [((128, 128), 11), ((48, 60), 11), ((60, 48), 12), ((44, 44), 11)]


def drawn(draw, size, side, pictures=500, **options):
    return places.draw_pairs(0, 3, pictures, size, side, draw, **options)


@pytest.mark.parametrize(("size", "side"), SIZES)
@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_both_patches_of_a_pair_lie_in_the_picture(draw, size, side):
    pairs = drawn(draw, size, side)
    for place in (pairs.centre, pairs.other):
        assert place.shape == (500, 2)
        assert (place - side // 2 >= 0).all()
        assert (place + side // 2 < torch.tensor(size)).all()


def test_directions_go_round_from_the_right_downwards_and_the_ninth_is_the_first_again():
    direction, half = np.arange(9), np.full((9, 2), 0.5)
    first, other = places.in_direction(half, np.zeros(9), direction, (128, 128), 10)
    assert (first == 64).all()
    rows, columns = (other - first).T
    assert np.sign(np.round(rows, -1)).tolist() == [0, 1, 1, 1, 0, -1, -1, -1, 0]
    assert np.sign(np.round(columns, -1)).tolist() == [1, 1, 0, -1, -1, -1, 0, 1, 1]
    assert np.abs(other[0] - other[8]).max() <= 1  # the sine of a whole turn rounds to just below 0
    _, further = places.in_direction(half, np.ones(9), direction, (128, 128), 10)
    for far, apart in ((other, 15), (further, 20)):
        assert np.hypot(*(far - first).T) == pytest.approx(np.full(9, apart), abs=1.5)
    assert set(drawn(DRAWS["eight"], (128, 128), 11).target.tolist()) == set(range(8))
    assert set(drawn(DRAWS["nine"], (128, 128), 11).target.tolist()) == set(range(9))


def test_adjacent_patches_touch_at_a_corner_and_far_ones_are_two_sides_apart():
    pairs = drawn(places.draw_adjacency, (128, 128), 11)
    apart, near = pairs.other - pairs.centre, pairs.target == 1
    assert 0.4 < near.float().mean() < 0.6
    assert (apart[near].abs() == 11).all()
    assert apart[~near].double().norm(dim=1).min() > 2 * 11 - 1.5
    assert len(apart[near].unique(dim=0)) == 4


@pytest.mark.parametrize("draw", DRAWS.values(), ids=list(DRAWS))
def test_a_draw_belongs_to_the_step_and_the_place_in_the_global_batch(draw, monkeypatch):
    whole, size = drawn(draw, (48, 48), 11, 6), ((48, 48), 11)
    assert torch.equal(drawn(draw, *size, 6).other, whole.other)
    assert not torch.equal(places.draw_pairs(0, 4, 6, *size, draw).other, whole.other)
    shared = drawn(draw, *size, 6, shared=True)
    assert all(len(part.unique(dim=0)) == 1 for part in (shared.centre, shared.other, shared.target))
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "own_slice", lambda rows: rows[len(rows) // 2 :])
    second = drawn(draw, *size, 3)
    assert torch.equal(second.centre, whole.centre[3:])
    assert torch.equal(second.target, whole.target[3:])
    assert torch.equal(drawn(draw, *size, 3, shared=True).other, shared.other[3:])


def test_pictures_without_room_for_pairs_are_refused():
    with pytest.raises(ConfigError) as caught:
        drawn(places.draw_adjacency, (60, 43), 11)
    assert str(caught.value) == (
        "method.side=11: a pair of patches needs training pictures of 4 sides, 44 px, and theirs is 43 px; set 10 or "
        "less, or larger pictures (data.train_size)"
    )


@pytest.mark.parametrize("grid", [(9, 12), (30, 45), (4, 7)])
@pytest.mark.parametrize("side", [11, 4])
def test_features_are_cut_as_if_the_whole_map_had_been_enlarged(grid, side):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(3, 5, *grid, generator=generator).requires_grad_()
    place, size, half = torch.tensor([[10, 20], [5, 5], [24, 39]]), (30, 45), side // 2
    wide = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
    wanted = torch.stack(
        [
            picture[:, row - half : row + half + 1, column - half : column + half + 1]
            for picture, (row, column) in zip(wide, place.tolist(), strict=True)
        ]
    )
    found = places.cut_features(maps, place, side, size)
    assert torch.allclose(found, wanted, atol=1e-6)
    weight = torch.rand(found.shape, generator=generator)
    gradients = [torch.autograd.grad((part * weight).sum(), maps)[0] for part in (found, wanted)]
    assert torch.allclose(*gradients, atol=1e-5)


def test_windows_are_cut_around_their_places():
    images = torch.rand(2, 3, 40, 50, generator=torch.Generator().manual_seed(0))
    place = torch.tensor([[10, 20], [30, 8]])
    odd, even = places.cut_picture(images, place, 11), places.cut_picture(images, place, 8)
    assert torch.equal(odd[1], images[1, :, 25:36, 3:14])
    assert torch.equal(even[0], images[0, :, 6:14, 16:24])


def test_a_pair_counts_where_one_of_its_places_is_in_the_mask():
    valid = torch.zeros(4, 8, 8, dtype=torch.bool)
    valid[0, 1, 2] = valid[1, 5, 6] = valid[2, 1, 2] = valid[2, 5, 6] = True
    centre, other = torch.tensor([[1, 2]]).expand(4, 2), torch.tensor([[5, 6]]).expand(4, 2)
    assert places.counted(valid, centre, other).tolist() == [True, True, True, False]
