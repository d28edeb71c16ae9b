"""The DeepLab head: grids, norms, refusals."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from models.deeplab import DeepLabHead, MaskHead

SETTINGS = {"hidden": 16, "rates": [1, 2], "norm": "group", "dropout": 0.0}


def test_grids_of_both_versions():
    levels = [torch.randn(2, 6, 12, 10), torch.randn(2, 4, 8, 8), torch.randn(2, 9, 6, 5)]
    plus = DeepLabHead([6, 4, 9], 5, **SETTINGS)
    codes = plus(levels)
    assert codes.shape == (2, 16, 12, 10)
    assert plus.classify(codes).shape == (2, 5, 12, 10)
    assert torch.equal(plus([levels[0], levels[1] + 1, levels[2]]), codes)  # levels between are not looked at
    assert not torch.equal(plus([levels[0] + 1, *levels[1:]]), codes)
    assert DeepLabHead([9], 5, **SETTINGS)(levels[2:]).shape == (2, 16, 6, 5)


def test_a_picture_is_seen_by_itself_with_group_norms():
    head = DeepLabHead([6], 5, **SETTINGS).train()
    assert not [part for part in head.modules() if isinstance(part, nn.BatchNorm2d)]
    maps = torch.randn(3, 6, 4, 4)
    assert torch.allclose(head([maps])[:1], head([maps[:1]]), atol=1e-6)
    batch = DeepLabHead([6], 5, **(SETTINGS | {"norm": "batch"})).train()
    assert not torch.allclose(batch([maps])[:2], batch([maps[:2]]), atol=1e-3)


def test_dropout_is_that_of_the_key():
    head = DeepLabHead([6], 5, **(SETTINGS | {"dropout": 0.5})).train()
    maps = torch.randn(2, 6, 4, 4)
    assert not torch.equal(head([maps]), head([maps]))
    assert torch.equal(head.eval()([maps]), head([maps]))


REFUSED = {
    ("norm", "layer"): "method.head.norm=layer: not one of batch, group",
    ("hidden", 3): "method.head.hidden=3: must be at least 4",
    ("dropout", 1.0): "method.head.dropout=1: expected a number from 0 to below 1",
}


@pytest.mark.parametrize("wrong", REFUSED)
def test_refusals(wrong):
    with pytest.raises(ConfigError) as caught:
        DeepLabHead([6], 5, **(SETTINGS | dict([wrong])))
    assert str(caught.value) == REFUSED[wrong]
    with pytest.raises(ConfigError, match="expected dilations of at least 1"):
        DeepLabHead([6], 5, **(SETTINGS | {"rates": []}))


def test_the_mask_head_gives_embeddings_and_one_logit():
    head = MaskHead([6, 9], 5, **SETTINGS)
    codes = head([torch.randn(2, 6, 8, 8), torch.randn(2, 9, 4, 4)])
    assert head.classify(codes).shape == (2, 5, 8, 8)
    assert head.salience(codes).shape == (2, 8, 8)
    assert torch.equal(head.salience(0 * codes), torch.zeros(2, 8, 8))  # no bias: nothing seen is nothing said
