"""Copy-paste by hand: who is whose partner, what is covered, what is left out, and whose draw it is."""

import pytest
import torch

from lightning_modules.detection.copy_paste import copy_paste, drawn, pasted_on

KEYS = [(0, 5, index) for index in range(5)]


def square(top, left, size=8, name=1, side=32):
    ids = torch.zeros(side, side, dtype=torch.int64)
    ids[top : top + size, left : left + size] = name
    return ids


def pictures(ids, values):
    return torch.stack([torch.full((3, *one.shape), value) for one, value in zip(ids, values, strict=True)])


def test_an_object_comes_with_its_pixels_and_an_id_of_its_own():
    mine, other = square(0, 0), square(20, 20, name=3)
    image, ids = pasted_on(
        torch.zeros(3, 32, 32), mine, torch.ones(3, 32, 32), other, KEYS[0], (1.0, 1.0)
    )  # at its own size it can lie at one place alone
    assert torch.equal(ids == 1, mine == 1)
    assert torch.equal(ids == 2, other == 3)
    assert torch.equal(image[0] == 1, other == 3)


def test_covered_objects_lose_pixels_unless_it_were_half_of_them():
    mine = square(0, 0)
    _, ids = pasted_on(torch.zeros(3, 32, 32), mine, torch.ones(3, 32, 32), square(5, 0), KEYS[0], (1.0, 1.0))
    assert (ids == 1).sum() == 40
    assert (ids == 2).sum() == 64
    image, ids = pasted_on(torch.zeros(3, 32, 32), mine, torch.ones(3, 32, 32), square(4, 0), KEYS[0], (1.0, 1.0))
    assert torch.equal(ids, mine)
    assert not image.any()


def test_places_that_are_not_known_can_be_covered():
    mine = torch.full((32, 32), 255)
    _, ids = pasted_on(torch.zeros(3, 32, 32), mine, torch.ones(3, 32, 32), square(4, 0), KEYS[0], (1.0, 1.0))
    assert (ids == 1).sum() == 64
    assert (ids == 255).sum() == 32 * 32 - 64


def test_some_but_never_all_of_several_objects_are_copied():
    counts = {drawn((0, step, 1), 4, (0.3, 1.0)).count for step in range(60)}
    assert counts == {1, 2, 3}
    assert {drawn((0, step, 1), 1, (0.3, 1.0)).count for step in range(5)} == {1}
    ratios = [drawn((0, step, 1), 1, (0.3, 0.6)).ratio for step in range(60)]
    assert 0.3 <= min(ratios) < 0.35 < 0.55 < max(ratios) <= 0.6


def test_partners_are_pairs_and_draws_are_those_of_the_picture():
    ids = torch.stack([square(0, 0), square(20, 20), square(8, 20), square(20, 8), square(2, 2)])
    images = pictures(ids, (0.1, 0.2, 0.3, 0.4, 0.5))
    seen, found = copy_paste(images, ids, KEYS, (1.0, 1.0))
    assert torch.equal(found[0] == 2, ids[1] == 1)
    assert torch.equal(found[3] == 2, ids[2] == 1)
    assert seen[3].unique().tolist() == pytest.approx([0.3, 0.4])
    assert torch.equal(found[4], ids[4])
    later = copy_paste(images[2:4], ids[2:4], KEYS[2:4], (0.4, 0.8))
    whole = copy_paste(images, ids, KEYS, (0.4, 0.8))
    assert torch.equal(later[1], whole[1][2:4])
    assert torch.equal(later[0], whole[0][2:4])


def test_without_ratios_nothing_changes():
    ids = torch.stack([square(0, 0), square(20, 20)])
    images = pictures(ids, (0.0, 1.0))
    assert copy_paste(images, ids, KEYS, None) == (images, ids)


def test_a_partner_without_objects_gives_none():
    mine = square(0, 0)
    _, ids = pasted_on(torch.zeros(3, 32, 32), mine, torch.ones(3, 32, 32), mine * 255, KEYS[0], (0.3, 1.0))
    assert torch.equal(ids, mine)
