"""The ordered network: the past alone is seen, through any number of layers; attention by its rules."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models.scratch import ordered, orders

HEIGHT, WIDTH = 4, 5


class Layers(nn.Module):
    """Two blocks with attention between them, in one order."""

    def __init__(self, order: int, rule: str):
        super().__init__()
        self.order = order
        self.first, self.second = ordered.ResidualBlock(2), ordered.ResidualBlock(4)
        self.attention = ordered.OrderedAttention(4, 3, **ordered.ATTENTION[rule])

    def forward(self, maps):
        return self.second(self.attention(self.first(maps, self.order), self.order), self.order)


def reach(network: nn.Module) -> torch.Tensor:
    """Whether the output at pixel u depends on the input at pixel v: bool [u,v]."""
    maps = torch.rand(1, 2, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.autograd.functional.jacobian(lambda given: network(given).sum((0, 1)).flatten(), maps)
    return seen.abs().sum((1, 2)).flatten(1) > 0


@pytest.fixture
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("order", orders.ORDERS)
def test_through_all_layers_a_pixel_depends_on_its_past_alone(order, seeded):
    """And on all of it: attention reaches everything that is not ahead."""
    found = reach(Layers(order, "masked").double())
    assert torch.equal(found, ordered.past_mask(order, HEIGHT, WIDTH))


def test_in_order_0_every_pixel_depends_on_every_other(seeded):
    assert reach(Layers(0, "masked").double()).all()


@pytest.mark.parametrize("rule", ["multiplied", "reproduction"])
def test_a_mask_behind_the_softmax_looks_ahead(rule, seeded):
    """Through what the softmax divides by; why it is not the default."""
    assert (reach(Layers(2, rule).double()) & ~ordered.past_mask(2, HEIGHT, WIDTH)).any()


def test_masked_attention_is_softmax_over_the_past(seeded):
    """The sorted causal attention equals -inf before a scaled softmax."""
    query, key, value = torch.randn(3, 2, HEIGHT * WIDTH, 6)
    for order in orders.ORDERS:
        logits = query @ key.transpose(1, 2) / 6**0.5
        ahead = ~ordered.past_mask(order, HEIGHT, WIDTH)
        expected = logits.masked_fill(ahead, -torch.inf).softmax(2) @ value
        torch.testing.assert_close(ordered.causal(query, key, value, order, WIDTH), expected)


def test_a_weight_is_never_turned_and_masked_taps_learn_nothing(seeded):
    conv = ordered.MaskedConv2d(1, 1, 3)
    maps = torch.randn(1, 1, 6, 7)
    for order in orders.ORDERS:
        conv.zero_grad()
        found = conv(maps, order)
        padded = F.pad(maps, orders.padding(order, 3))
        mask = orders.kernel_mask(order, 3)
        row, column = 2, 3
        window = padded[0, 0, row : row + 3, column : column + 3]
        torch.testing.assert_close(found[0, 0, row, column], (window * mask * conv.weight[0, 0]).sum() + conv.bias[0])
        found.sum().backward()
        assert torch.equal(conv.weight.grad[0, 0] != 0, mask > 0)


def test_decoder_gives_probabilities_at_the_size_asked_for(seeded):
    found = ordered.Decoder(3, 4).probabilities(torch.randn(2, 3, 5, 6), (18, 24))
    assert found.shape == (2, 4, 18, 24)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 18, 24))


def test_several_orders_are_read_at_once_and_order_0_comes_back(seeded):
    network = ordered.OrderedNetwork(width=4, blocks=2, attention_after=1, out_indices=[1, 0]).eval()
    pictures = torch.rand(2, 3, 18, 22)
    with ordered.reading(network, 3, 6):
        both = network(pictures)
    assert [tuple(level.shape) for level in both] == [(4, 8, 5, 6), (4, 16, 5, 6)]
    for half, order in zip(both[1].chunk(2), (3, 6), strict=True):
        with ordered.reading(network, order):
            torch.testing.assert_close(network(pictures)[1], half)
    assert network.orders == (0,)
    assert not torch.allclose(network(pictures)[1], both[1][:2])


@pytest.mark.parametrize(("stride", "side"), [(1, 8), (2, 4)])
def test_stride_of_the_stem_and_channels_of_the_picture(stride, side, seeded):
    network = ordered.OrderedNetwork(in_chans=4, width=4, blocks=3, stem_stride=stride)
    (found,) = network(torch.rand(1, 4, 16, 16))
    assert found.shape == (1, 32, side, side)


def test_blocks_behind_the_last_level_are_not_made():
    network = ordered.OrderedNetwork(width=4, blocks=3, attention_after=3, out_indices=[0])
    assert len(network.blocks) == 1
    assert not hasattr(network, "attention")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"blocks": 0}, "blocks=0: expected a whole number of 1 or more"),
        ({"width": True}, "width=True: expected a whole number of 1 or more"),
        ({"stem_stride": 3}, "stem_stride=3: expected 1 or 2"),
        ({"attention": "soft"}, "attention=soft: not one of masked, multiplied, reproduction"),
        (
            {"blocks": 2, "attention_after": 3},
            "attention_after=3: expected the number of a block, 1 to 2 (blocks), or 0 for none",
        ),
    ],
)
def test_settings_that_the_network_cannot_have(settings, said):
    with pytest.raises(ValueError) as caught:
        ordered.OrderedNetwork(**settings)
    assert str(caught.value) == said
