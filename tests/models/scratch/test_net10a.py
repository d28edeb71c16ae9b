"""IIC's network as a backbone: its maps, its channels, its edges, its settings, and its heads."""

import pytest
import torch
from omegaconf import OmegaConf

from common.errors import ConfigError
from models.backbone import Backbone
from models.scratch.net10a import InformationHead, Net10a, grey, sobel, with_edges
from tests.models.networks import PRESETS, refusal

NARROW = {"widths": [4, 6, 8, 8, 10, 12]}


def backbone(levels=None, frozen=True, **create):
    cfg = OmegaConf.load(PRESETS / "net10a.yaml")
    cfg.levels, cfg.frozen = levels, frozen
    cfg.create = {**cfg.create, **NARROW, **create}
    return cfg


@pytest.mark.parametrize(("padding", "sides"), [(1, [64, 64, 32, 32, 30, 28]), ("same", [64, 64, 32, 32, 32, 32])])
def test_levels_strides_and_sizes(padding, sides):
    model = Backbone(backbone(levels=[0, 1, 2, 3, 4, 5], padding=padding))
    found = model.features(torch.rand(2, 3, 64, 64)).levels
    assert [tuple(level.shape) for level in found] == [
        (2, width, side, side) for width, side in zip(NARROW["widths"], sides, strict=True)
    ]
    assert (model.channels, model.strides, model.stride) == (NARROW["widths"], [1, 1, 2, 2, 2, 2], 2)
    assert not model.has_attention
    assert model.licence == "none (random weights)"


def test_the_preset_takes_pictures_as_they_are_and_gives_the_last_level():
    model = Backbone(OmegaConf.load(PRESETS / "net10a.yaml"))
    assert (model.mean.flatten().tolist(), model.std.flatten().tolist()) == ([0, 0, 0], [1, 1, 1])
    assert (model.channels, sum(value.numel() for value in model.parameters())) == ([512], 4_500_864)
    assert model.features(torch.rand(1, 3, 32, 32)).map.shape == (1, 512, 12, 12)


def test_frozen_and_trained_weights_are_those_of_the_seed_and_kaimings():
    frozen, trained = Backbone(backbone(), seed=3), Backbone(backbone(frozen=False), seed=3).eval()
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(frozen.features(images).map, trained.features(images).map)
    assert not torch.equal(Backbone(backbone(), seed=4).features(images).map, frozen.features(images).map)
    last = Net10a().features[-3].weight
    assert last.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.02)


def test_only_what_the_levels_need_is_built_and_learns():
    model = Backbone(backbone(levels=[2], frozen=False))
    assert len(model.net.features) == 10
    model.features(torch.rand(1, 3, 16, 16), grad=True).map.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_four_channels_and_edges():
    model = Backbone(backbone(in_chans=4, sobel=True, frozen=False))
    assert model.in_channels == 4
    assert model.net.features[0].in_channels == 6
    image = torch.rand(2, 4, 16, 16)
    seen = with_edges(image)
    assert torch.equal(seen[:, [0, 1, 2, 5]], image)
    assert torch.equal(seen[:, 3:5], sobel(grey(image[:, :3])))
    assert with_edges(image[:, :3]).shape[1] == 5
    model.features(image, grad=True).map.sum().backward()


def test_edges_fall_to_the_right_and_downwards():
    columns = torch.arange(5.0).expand(1, 1, 5, 5)
    assert sobel(columns)[0, :, 2, 2].tolist() == [-8, 0]
    assert sobel(columns.mT)[0, :, 2, 2].tolist() == [0, -8]
    assert grey(torch.ones(1, 3, 1, 1)).item() == pytest.approx(1)


def test_weights_go_through_a_file(tmp_path):
    first = Backbone(backbone(in_chans=4), seed=1)
    trained = Backbone(backbone(in_chans=4, frozen=False), seed=1)
    torch.save({f"trunk.{name}": value for name, value in trained.exported().items()}, tmp_path / "net.pth")
    cfg = backbone(in_chans=4)
    cfg.weights = str(tmp_path / "net.pth")
    image = torch.rand(1, 4, 16, 16)
    assert torch.equal(Backbone(cfg, seed=2).features(image).map, first.features(image).map)


@pytest.mark.parametrize(
    ("create", "said"),
    [
        ({"in_chans": 0}, "in_chans=0: expected a whole number of 1 or more"),
        ({"in_chans": 2, "sobel": True}, "sobel=True: expected true or false, and true needs pictures"),
        ({"padding": 2}, "padding=2: expected 1 (as released) or same"),
        ({"widths": [4]}, "widths=[4]: expected 6 whole numbers of 1 or more"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_wrong_settings(create, said):
    text = refusal(ConfigError, backbone(**create))
    assert text.startswith("backbone.timm=net10a: timm cannot build it with ")
    assert said in text


def test_numbers_for_each_channel():
    cfg = backbone(in_chans=4)
    cfg.mean = [0.5, 0.5, 0.5]
    assert "expected 4 numbers each, one a channel, std above 0" in refusal(ConfigError, cfg)


@pytest.mark.parametrize("padding", [True, False])
def test_heads_give_probabilities_and_a_ring_of_even_ones(padding):
    head = InformationHead(6, 4, sub_heads=2, padding=padding)
    maps = torch.randn(3, 6, 5, 7)
    found = head(maps)
    assert [tuple(values.shape) for values in found] == [(3, 4, 5 + 2 * padding, 7 + 2 * padding)] * 2
    assert not torch.equal(*found)
    inner = found[0][..., 1:-1, 1:-1] if padding else found[0]
    torch.testing.assert_close(inner, torch.einsum("kc,nchw->nkhw", head.heads[0].weight[..., 0, 0], maps).softmax(1))
    if padding:
        assert torch.equal(found[0][..., 0, :], torch.full((3, 4, 9), 0.25))
    grown = head(maps, (12, 20))
    assert grown[0].shape == (3, 4, 12, 20)
    torch.testing.assert_close(grown[0].sum(1), torch.ones(3, 12, 20))
