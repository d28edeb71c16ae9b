"""PiCIE's decoder: laterals are summed from the coarsest level to the finest, on any backbone's levels."""

import pytest
import torch
import torch.nn.functional as F

from models.backbone import Backbone
from models.features import Features
from models.fpn import FPN
from tests.models.networks import make_cfg, make_cnn


def test_sums_of_laterals_on_the_grid_of_the_finest_level():
    draw = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, c, side, side + 1, generator=draw) for c, side in ((4, 12), (6, 6), (8, 3))]
    fpn = FPN([4, 6, 8], [4, 8, 16], 5)
    fine, middle, coarse = (F.conv2d(x, own.weight, own.bias) for x, own in zip(levels, fpn.laterals, strict=True))
    middle = middle + F.interpolate(coarse, size=(6, 7), mode="bilinear", align_corners=False)
    expected = fine + F.interpolate(middle, size=(12, 13), mode="bilinear", align_corners=False)
    assert torch.allclose(fpn(levels), expected, atol=1e-6)
    turned = FPN([8, 6, 4], [16, 8, 4], 5)
    for own, other in zip(reversed(fpn.laterals), turned.laterals, strict=True):
        other.load_state_dict(own.state_dict())
    assert torch.allclose(turned(levels[::-1]), expected, atol=1e-6)  # whatever order backbone.levels has


@pytest.mark.parametrize(
    ("cfg", "cells"),
    [
        (make_cnn(levels=[-4, -3, -2, -1], frozen=False), 16),
        (make_cnn(timm="mobilenetv2_050", create={}, levels=[-4, -3, -2, -1], frozen=False), 16),
        (make_cfg(levels=[0, 1, 2], frozen=False), 8),
    ],
    ids=["resnet", "mobilenet", "transformer"],
)
def test_every_level_of_a_backbone_is_reached_by_the_gradient(cfg, cells):
    backbone = Backbone(cfg)
    fpn = FPN(backbone.channels, backbone.strides, 7)
    maps = fpn(backbone.features(torch.rand(2, 3, 64, 64), grad=True).levels)
    assert maps.shape == (2, 7, cells, cells)
    maps.square().mean().backward()
    assert all(own.weight.grad.abs().sum() > 0 for own in fpn.laterals)
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_a_start_is_a_linear_map_of_all_levels_together():
    """Though levels are enlarged behind their laterals here, and before the map there."""
    draw = torch.Generator().manual_seed(0)
    levels = [torch.randn(2, c, side, side, generator=draw) for c, side in ((8, 3), (4, 12))]
    fpn = FPN([8, 4], [16, 4], 7)
    weight, bias = torch.randn(5, 12, generator=draw), torch.randn(5, generator=draw)
    fpn.begin(weight, bias)
    expected = torch.einsum("dc,bchw->bdhw", weight, Features(levels).concat()) + bias[:, None, None]
    found = fpn(levels)
    assert torch.allclose(found[:, :5], expected, atol=1e-5)
    assert not found[:, 5:].any()
    assert all(own.weight.requires_grad for own in fpn.laterals)
