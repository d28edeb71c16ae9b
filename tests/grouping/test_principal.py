"""Principal masks: what they may depend on, and directions by every way there is."""

import pytest
import torch
import torch.nn.functional as F

from grouping import principal


def pictures(count: int = 4, channels: int = 24, side: int = 12, common: float = 0.5) -> torch.Tensor:
    """Features [B,C,h,w] of regions with a direction each, one that all share, and noise."""
    draws = torch.Generator().manual_seed(1)
    centres = torch.rand(count, 5, 2, generator=draws) * side
    axis = torch.arange(side) + 0.5
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(1, -1, 2)
    region = torch.cdist(places.expand(count, -1, -1), centres).argmin(2)
    rows = torch.randn(count, 5, channels, generator=draws).gather(1, region[..., None].expand(-1, -1, channels))
    rows = rows + common * torch.randn(channels, generator=draws)
    rows = rows + 0.5 * torch.randn(rows.shape, generator=draws)
    return rows.mT.unflatten(2, (side, side))


def places_of(stacks: list[principal.MaskStack]) -> list[torch.Tensor]:
    return [stack.masks > 0 for stack in stacks]


@pytest.mark.parametrize("sign", principal.SIGNS)
def test_masks_do_not_meet_and_leave_little(sign):
    for stack in principal.principal_masks(pictures(), 0.4, sign):
        assert ((stack.masks > 0).sum(0) <= 1).all()
        assert (~stack.left[-1]).float().mean() >= principal.LEFT_OUT
        assert (stack.left[-1] == ~(stack.masks > 0).any(0)).all()


def test_a_mask_is_what_is_alike_enough_to_its_seed():
    maps = pictures()
    for picture, stack in zip(maps, principal.principal_masks(maps, 0.4), strict=True):
        unit = F.normalize(picture.flatten(1), dim=0)
        free = torch.ones(unit.shape[1], dtype=torch.bool)
        for mask, seed in zip(stack.masks.flatten(1), stack.seeds, strict=True):
            near = unit[:, seed] @ unit
            assert free[seed]
            assert mask[seed] == 1
            assert ((mask > 0) == (free & (near >= 0.4))).all()
            torch.testing.assert_close(mask[mask > 0], near[mask > 0])
            free &= mask <= 0


@pytest.mark.parametrize("factor", [-1.0, 3.7])
def test_neither_the_sign_nor_the_scale_of_features_matters(factor):
    maps = pictures()
    plain, other = (places_of(principal.principal_masks(part, 0.4)) for part in (maps, factor * maps))
    assert all(torch.equal(one, two) for one, two in zip(plain, other, strict=True))


def test_the_release_seeds_among_what_has_left_and_the_default_never():
    """Directions that every feature that is left points against: the largest product is the 0 of those that have."""
    maps = pictures(1, common=0.0)
    (first,) = principal.principal_masks(maps, 0.4)
    against = torch.stack([maps[0].flatten(1).mean(1), *[-maps[0][:, left].mean(1) for left in first.left]])[None]
    released = principal.principal_masks(maps, 0.4, against.repeat(1, 60, 1))[0]
    taken = [not bool(left.flatten()[seed]) for left, seed in zip(released.left, released.seeds[1:], strict=False)]
    assert any(taken)
    ours = [bool(left.flatten()[seed]) for left, seed in zip(first.left, first.seeds[1:], strict=False)]
    assert all(ours)


def test_a_picture_alone_has_the_masks_that_it_has_in_a_batch():
    maps = pictures()
    together = principal.principal_masks(maps, 0.4)
    for number, stack in enumerate(together):
        (alone,) = principal.principal_masks(maps[number : number + 1], 0.4)
        assert torch.equal(alone.masks, stack.masks)


@pytest.mark.parametrize("channels", [24, 80])  # dense, Lanczos
def test_directions_are_those_of_a_decomposition_in_double(channels):
    """Also where the products are kept from call to call, and where few samples are left."""
    rows = pictures(1, channels).flatten(2)
    scatters = principal.Scatters(rows)
    left = torch.ones(1, rows.shape[2], dtype=torch.bool)
    for gone in (20, 70, 120, 137):
        left[:, :gone] = False
        found = scatters.directions(left)
        samples = rows[0][:, left[0]].double().T
        wanted = torch.linalg.svd(samples - samples.mean(0)).Vh[0]
        assert torch.linalg.vector_norm(found) == pytest.approx(1, abs=1e-5)
        assert abs(float(found[0].double() @ wanted)) > 1 - 1e-6
        torch.testing.assert_close(found.abs(), principal.Scatters(rows).directions(left).abs(), rtol=0, atol=1e-4)


def test_all_pictures_at_once_have_the_directions_of_each_alone():
    """The way of a GPU."""
    rows = pictures().flatten(2)
    left = torch.rand(len(rows), rows.shape[2], generator=torch.Generator().manual_seed(0)) < 0.3
    alone = torch.cat(
        [principal.Scatters(part[None]).directions(own[None]) for part, own in zip(rows, left, strict=True)]
    )
    together = principal.Scatters(rows).directions_of_all(left)
    assert ((together * alone).sum(1).abs() > 1 - 1e-5).all()


def test_a_single_place_and_one_feature_everywhere_end():
    flat = torch.ones(1, 3, 4, 4)
    (stack,) = principal.principal_masks(flat, 0.4)
    assert len(stack.masks) == 1
    assert (stack.masks > 0).all()
    (stack,) = principal.principal_masks(torch.zeros(1, 3, 4, 4), 0.4)
    assert len(stack.masks) == 3
    assert not stack.masks.any()
    (stack,) = principal.principal_masks(torch.ones(1, 3, 1, 1), 0.4)
    assert stack.masks.tolist() == [[[1.0]]]


def test_log_probabilities_of_cleaned_masks_and_of_what_they_leave():
    masks = torch.zeros(2, 5, 5)
    masks[0, :, :3] = 0.5
    masks[1, 4, 4] = 1.0  # a single place, which the median removes
    log_probs, background, filtered = principal.label_log_probs(masks)
    assert filtered[0].tolist() == [[1.0] * 3 + [0.0] * 2] * 5
    assert not filtered[1].any()
    assert torch.equal(background, 1 - filtered[0])
    assert log_probs.shape == (3, 5, 5)
    torch.testing.assert_close(log_probs[1, 0, 0].exp(), torch.e / (torch.e + torch.tensor(2.0)))
    nothing = principal.label_log_probs(torch.zeros(1, 3, 3))
    assert torch.isfinite(nothing[0]).all()
    assert (nothing[1] == 1).all()
    assert torch.isfinite(principal.label_log_probs(torch.ones(1, 1, 4))[0]).all()


def test_moments_add_up_and_directions_point_along_the_mean():
    rows = pictures(1)[0].flatten(1).T
    whole = principal.Moments.of(rows).directions(5)
    parts = (principal.Moments.of(rows[:50]) + principal.Moments.of(rows[50:])).directions(5)
    torch.testing.assert_close(parts, whole)
    centred = rows.double() - rows.double().mean(0)
    wanted = torch.linalg.svd(centred, full_matrices=False).Vh[:5]
    torch.testing.assert_close(whole.abs(), wanted.abs())
    assert (whole @ rows.double().mean(0) >= 0).all()
