"""Affine maps of views: what they do to pictures and maps of ids, with crops and flips, and how they are undone."""

import math

import numpy as np
import torch

from common.spec import IGNORE, OUTSIDE, Affine, Geometric, ViewSpec
from datamodules.base import affine
from datamodules.base.transforms import draw_geometry, replay, take
from datamodules.base.views import make_views


def smooth(count=2, channels=3, side=32):
    """Pictures that interpolation hardly changes, [B,C,H,W]."""
    y, x = torch.meshgrid(torch.linspace(0, 3, side), torch.linspace(0, 2, side), indexing="ij")
    return torch.stack([torch.sin(x + 0.3 * n) * torch.cos(y) / 2 + 0.5 for n in range(count * channels)]).view(
        count, channels, side, side
    )


def drawn(count=3, **settings):
    return affine.draw_affine(Affine(**settings), count, np.random.default_rng(0))


def test_draws_are_rotations_shears_and_scales_within_their_ranges():
    maps = drawn(200, rotation=30, shear=0, scale=(0.8, 1.2))
    scale = torch.linalg.det(maps[:, :, :2]).sqrt()
    angle = torch.atan2(maps[:, 1, 0], maps[:, 0, 0])
    assert 0.8 <= scale.min() < 0.9 < 1.1 < scale.max() <= 1.2
    assert math.radians(25) < angle.abs().max() <= math.radians(30)
    torch.testing.assert_close(maps[:, 0, 0], maps[:, 1, 1])
    sheared = drawn(200, rotation=0, shear=10, scale=(1, 1))
    torch.testing.assert_close(sheared[:, 0, 0], torch.ones(200))
    assert 0.1 < sheared[:, 0, 1].abs().max() <= math.sin(math.radians(10)) + 1e-6
    assert not maps[:, :, 2].any()


def test_a_quarter_turn_of_a_picture_and_its_ids():
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0]]])
    picture = torch.arange(9.0).view(1, 1, 3, 3)
    turned = picture.rot90(1, (2, 3))
    found = affine.warped(picture, turn)
    assert torch.allclose(found, turned) or torch.allclose(found, picture.rot90(-1, (2, 3)))
    assert torch.equal(affine.warped_ids(picture[:, 0].long(), turn, 255), found[:, 0].round().long())


def test_outside_is_nothing():
    twice = torch.tensor([[[2.0, 0, 0], [0, 2, 0]]])
    ids = affine.warped_ids(torch.zeros(1, 8, 8, dtype=torch.int64), twice, IGNORE)
    assert (ids[0, 2:6, 2:6] == 0).all()
    assert (ids == 0).sum() == 16
    assert (ids[0, 0] == IGNORE).all()
    assert affine.warped_ids(torch.ones(1, 8, 8, dtype=torch.bool), twice, IGNORE).sum() == 16
    assert affine.warped(torch.ones(1, 1, 8, 8), twice)[0, 0, 0, 0] == 0


def test_a_crop_and_flip_are_a_map():
    pictures = smooth(4)
    params = draw_geometry(Geometric(scale=(0.3, 0.6)), 4, (32, 32), np.random.default_rng(1))
    params = take(params, slice(0, 4), torch.device("cpu"))
    assert params.flip.any()
    found = affine.warped(pictures, affine.of_replay(params))
    assert torch.allclose(found[..., 2:-2, 2:-2], replay(pictures, params)[..., 2:-2, 2:-2], atol=0.01)


def test_maps_combine_and_are_undone():
    first, second = drawn(), drawn(rotation=5)
    pictures = smooth(3)
    together = affine.warped(pictures, affine.combined(first, second))
    after = affine.warped(affine.warped(pictures, first), second)
    assert torch.allclose(together[..., 8:-8, 8:-8], after[..., 8:-8, 8:-8], atol=0.02)
    identity = affine.combined(first, affine.inverse(first))
    torch.testing.assert_close(identity, torch.eye(2, 3).expand(3, 2, 3), atol=1e-6, rtol=0)


def test_a_view_and_its_maps_move_together():
    label = torch.zeros(4, 32, 32, dtype=torch.int64)
    label[:, :, 16:] = 1
    batch = {"image": label[:, None].float().expand(-1, 3, -1, -1), "label": label, "regions": label,
             "valid": torch.ones_like(label, dtype=torch.bool)}  # fmt: skip
    spec = ViewSpec(geometric=Geometric(sides=(1, 1)), affine=Affine(scale=(1.2, 1.3)))
    made = make_views(dict(batch), {"copy": spec}, 0, 5)
    assert made["copy.affine"].shape == (4, 2, 3)
    inside = made["copy.valid"]
    assert 0.3 < inside.float().mean() < 0.9
    assert torch.equal(made["copy.label"] == IGNORE, ~inside)
    assert torch.equal(made["copy.regions"] == OUTSIDE, ~inside)
    assert ((made["copy"][:, 0] > 0.5) == (made["copy.label"] == 1))[inside].float().mean() > 0.97
    again = make_views(dict(batch), {"copy": spec}, 0, 5)
    assert torch.equal(again["copy"], made["copy"])
    assert not torch.equal(make_views(dict(batch), {"copy": spec}, 0, 6)["copy"], made["copy"])
