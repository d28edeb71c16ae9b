"""The segmentation head, its channel dropout and the projection head."""

import pytest
import torch

from common import chance
from common.errors import ConfigError
from models.heads import ProjectionHead, PrototypeHead, SegmentationHead, channel_masks, drop_channels, patch_rows


def head(nonlinear=True, in_dim=6, dim=4):
    with chance.library_draws(0, "head"):
        return SegmentationHead(in_dim, dim, nonlinear)


def features(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def by_hand(module, rows, first=1.0, second=1.0):
    weight = {name: value.flatten(1) if value.dim() == 4 else value for name, value in module.state_dict().items()}
    codes = (rows * first) @ weight["linear.weight"].T + weight["linear.bias"]
    if module.nonlinear is None:
        return codes
    hidden = ((rows * second) @ weight["nonlinear.0.weight"].T + weight["nonlinear.0.bias"]).clamp_min(0)
    return codes + hidden @ weight["nonlinear.2.weight"].T + weight["nonlinear.2.bias"]


@pytest.mark.parametrize("nonlinear", [True, False])
def test_maps_and_rows_follow_the_formula(nonlinear):
    module, maps = head(nonlinear), features(2, 6, 3, 5)
    codes = module(maps)
    assert codes.shape == (2, 4, 3, 5)
    expected = by_hand(module, patch_rows(maps))
    torch.testing.assert_close(patch_rows(codes), expected)
    torch.testing.assert_close(module(patch_rows(maps)), expected)


def test_each_use_of_the_features_has_its_own_mask():
    module, maps = head(), features(2, 6, 3, 5)
    first, second = (channel_masks(0, purpose, 3, 2, 6, 0.5) for purpose in ("a", "b"))
    assert not torch.equal(first, second)
    expected = by_hand(module, patch_rows(maps), *(mask.repeat_interleave(15, 0) for mask in (first, second)))
    torch.testing.assert_close(patch_rows(module(maps, (first, second))), expected)
    rows = features(2, 6)
    torch.testing.assert_close(module(rows, (first, second)), by_hand(module, rows, first, second))


def test_one_mask_may_be_left_out():
    module, maps = head(), features(2, 6, 3, 5)
    mask = channel_masks(0, "a", 0, 2, 6, 0.5)
    expected = by_hand(module, patch_rows(maps), second=mask.repeat_interleave(15, 0))
    torch.testing.assert_close(patch_rows(module(maps, (None, mask))), expected)


def test_masks_are_keyed_and_keep_the_mean():
    mask = channel_masks(0, "head", 5, 64, 384, 0.1)
    assert torch.equal(mask, channel_masks(0, "head", 5, 64, 384, 0.1))
    for other in ((1, "head", 5), (0, "momentum", 5), (0, "head", 6)):
        assert not torch.equal(mask, channel_masks(*other, 64, 384, 0.1))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.9])
    assert mask.mean().item() == pytest.approx(1.0, abs=0.01)
    assert (channel_masks(0, "head", 5, 3, 4, 0.0) == 1).all()


def test_dropping_zeroes_whole_channels():
    maps, mask = features(2, 6, 3, 5), torch.tensor([[0.0, 2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 0]])
    dropped = drop_channels(maps, mask)
    assert (dropped[0, 0] == 0).all()
    torch.testing.assert_close(dropped[0, 1:], 2 * maps[0, 1:])
    assert drop_channels(maps, None) is maps


def test_patch_rows_go_picture_by_picture_row_by_row():
    maps = torch.arange(2 * 3 * 4.0).reshape(2, 1, 3, 4)
    assert patch_rows(maps).flatten().tolist() == list(range(24))
    two_channels = torch.cat([maps, maps + 100], 1)
    assert patch_rows(two_channels)[5].tolist() == [5, 105]


def test_projection_gives_unit_rows_of_maps_and_rows():
    with chance.library_draws(0, "projection"):
        module = ProjectionHead(4)
    codes = features(2, 4, 3, 5)
    z = module(codes)
    assert z.shape == (30, 4)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(30))
    raw = patch_rows(codes) @ module.linear.weight.T + module.linear.bias
    torch.testing.assert_close(z, raw / raw.norm(dim=1, keepdim=True))
    torch.testing.assert_close(module(patch_rows(codes)), z)


@pytest.mark.parametrize("p", [1.0, -0.1])
def test_a_wrong_share_is_named(p):
    with pytest.raises(ConfigError) as caught:
        channel_masks(0, "head", 0, 2, 3, p)
    assert str(caught.value) == f"channel dropout p = {p}: must lie in [0, 1); use 0 to switch it off"


def test_prototypes_are_directions_with_a_gain():
    prototypes, codes = PrototypeHead(6, 3), features(2, 6, 4, 5)
    directions = features(3, 6)
    prototypes.start(directions)
    unit = directions / directions.norm(dim=1, keepdim=True)
    torch.testing.assert_close(prototypes(codes), torch.einsum("kc,bchw->bkhw", unit, codes))
    assert torch.equal(prototypes.direction, directions)  # their length is kept
    with torch.no_grad():
        prototypes.gain.copy_(torch.tensor([1.0, 2.0, 0.5]))
        prototypes.direction.mul_(3)
    scaled = unit * torch.tensor([1.0, 2.0, 0.5])[:, None]
    torch.testing.assert_close(prototypes(codes), torch.einsum("kc,bchw->bkhw", scaled, codes))
    with torch.autocast("cpu", torch.bfloat16):
        assert prototypes(codes).dtype == torch.float32
