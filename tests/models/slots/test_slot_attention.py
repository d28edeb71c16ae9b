"""Slots share patches among themselves, and what is pooled by them."""

import pytest
import torch

from common.errors import ConfigError
from models.slots.decoders import MLPDecoder, TransformerDecoder
from models.slots.slot_attention import (
    InputMLP,
    SlotAttention,
    SlotStart,
    SoftPosition,
    empty_slots,
    mass_means,
    slot_vectors,
)


@pytest.fixture
def draws() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_patches_are_shared_and_slots_that_begin_alike_stay_alike(draws):
    tokens = torch.randn(2, 9, 6, generator=draws)
    slots, attention = SlotAttention(6, 8)(tokens, torch.randn(2, 1, 8, generator=draws).expand(-1, 3, -1))
    torch.testing.assert_close(attention, torch.full((2, 3, 9), 1 / 3))
    torch.testing.assert_close(slots[:, :1].expand(-1, 3, -1), slots)


def test_slots_and_patches_have_no_order(draws):
    module, tokens, start = SlotAttention(6, 8), *(torch.randn(1, n, d, generator=draws) for n, d in ((9, 6), (3, 8)))
    slots, attention = module(tokens, start)
    order, places = torch.tensor([2, 0, 1]), torch.randperm(9, generator=draws)
    moved, seen = module(tokens[:, places], start[:, order])
    torch.testing.assert_close(moved, slots[:, order])
    torch.testing.assert_close(seen, attention[:, order][:, :, places])


def test_gradient_goes_through_all_iterations(draws):
    start = SlotStart(8)
    noise = torch.randn(2, 3, 8, generator=draws)
    SlotAttention(6, 8)(torch.randn(2, 9, 6, generator=draws), start(noise))[0].square().sum().backward()
    assert start.mean.grad.abs().sum() > 0
    assert start.log_deviation.grad.abs().sum() > 0


def test_the_start_is_a_mean_and_a_deviation_that_all_slots_share():
    start = SlotStart(4)
    noise = torch.tensor([[[0.0] * 4, [1.0] * 4]])
    found = start(noise)[0]
    torch.testing.assert_close(found[0], start.mean[0, 0])
    torch.testing.assert_close(found[1] - found[0], start.log_deviation[0, 0].exp())


def test_biases_of_the_mlps_begin_at_zero():
    for layer in (InputMLP(6, 8).layers[0], InputMLP(6, 8).layers[2], SlotAttention(6, 8).mlp[0]):
        assert not layer.bias.any()


def test_a_place_is_its_distances_to_the_borders():
    module = SoftPosition(4)
    with torch.no_grad():
        module.dense.weight.copy_(torch.eye(4))
        module.dense.bias.zero_()
    found = module(torch.zeros(1, 4, 3, 5))[0]
    assert found[:, 0, 0].tolist() == [0, 0, 1, 1]
    assert found[:, 2, 4].tolist() == [1, 1, 0, 0]
    assert found[:, 1, 1].tolist() == [0.5, 0.25, 0.5, 0.75]


def test_what_slots_sum_up():
    masks = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 1.0]]])
    features = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [0.0, 5.0]]])
    assert torch.allclose(mass_means(masks, features)[0], torch.tensor([[4 / 3, 2 / 3], [0, 2], [0, 5]]))
    vectors = slot_vectors(masks, features)[0]
    assert torch.allclose(vectors[0], torch.tensor([2.0, 1.0]) / 5**0.5)
    assert torch.allclose(vectors[1:], torch.tensor([[0.0, 1.0], [0.0, 1.0]]))


def test_slots_that_win_nothing_or_next_to_nothing_are_empty():
    masks = torch.tensor([[[0.9, 0.6, 0.0], [0.1, 0.4, 0.0], [0.0, 0.0, 0.5]]])
    assert empty_slots(masks).tolist() == [[False, True, False]]
    assert empty_slots(masks * 1e-5).all()


def test_the_mixture_before_the_last_layer_is_that_of_what_slots_say(draws):
    module = MLPDecoder(8, 5, (3, 3), [12, 12])
    slots = torch.randn(2, 4, 8, generator=draws)
    told, masks = module(slots, torch.zeros(2, 9, 5), (3, 3))
    each = module.layers(slots.unsqueeze(2) + module.positions)
    shares = each[..., -1:].softmax(1)
    torch.testing.assert_close(masks, shares.squeeze(3))
    torch.testing.assert_close(told, (shares * each[..., :-1]).sum(1))


def test_shares_of_slots_are_what_attention_took_of_a_patch(draws):
    module = MLPDecoder(8, 5, (3, 3), [12, 12], shares="attention")
    slots = torch.randn(2, 4, 8, generator=draws)
    attention = torch.randn(2, 4, 9, generator=draws).softmax(1).requires_grad_()
    told, masks = module(slots, torch.zeros(2, 9, 5), (3, 3), attention)
    each = module.layers(slots.unsqueeze(2) + module.positions)
    assert torch.equal(masks, attention)
    torch.testing.assert_close(told, (attention.unsqueeze(3) * each).sum(1))
    told.square().sum().backward()
    assert attention.grad.abs().sum() > 0


def test_what_a_slot_says_keeps_its_size_through_the_layers(draws):
    values, sizes = torch.randn(1, 4, 256, generator=draws), {}
    for init in ("torch", "he"):
        module = MLPDecoder(256, 256, (2, 2), [256, 256], shares="attention", init=init)
        sizes[init] = module(values, torch.zeros(1, 4, 256), (2, 2), torch.eye(4)[None])[0].std().item()
    assert sizes["torch"] < 0.3
    assert 0.8 < sizes["he"] < 2


@pytest.mark.parametrize("key", ["shares", "init"])
def test_unknown_words_of_the_mlp_are_refused(key):
    with pytest.raises(ConfigError, match=f"method.decoder.mlp.{key}=some: not one of"):
        MLPDecoder(8, 5, (2, 2), [4], **{key: "some"})


def test_positions_are_interpolated_to_another_grid(draws):
    module = MLPDecoder(2, 5, (2, 2), [4])
    with torch.no_grad():
        module.positions.copy_(torch.tensor([[[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]]))
    found = module.positions_at((4, 2))[0].view(4, 2, 2)
    assert found[:, 0, 0].tolist() == [0, 0.25, 0.75, 1]
    told, masks = module(torch.randn(1, 3, 2, generator=draws), torch.zeros(1, 8, 5), (4, 2))
    assert told.shape == (1, 8, 5)
    assert masks.shape == (1, 3, 8)


def test_a_patch_is_told_from_those_before_it_and_from_slots_alone(draws):
    module = TransformerDecoder(8, 6, 2, 2)
    slots, target = torch.randn(1, 3, 8, generator=draws), torch.randn(1, 9, 6, generator=draws)
    target.requires_grad_()
    told, masks = module(slots, target, (3, 3))
    changed = target.detach().clone()
    changed[:, 4:] += 1
    other = module(slots, changed, (3, 3))[0]
    torch.testing.assert_close(other[:, :5], told[:, :5])
    assert not torch.allclose(other[:, 5:], told[:, 5:])
    assert not torch.allclose(module(slots + 1, target, (3, 3))[0][:, 0], told[:, 0])
    torch.testing.assert_close(masks.sum(1), torch.ones(1, 9))
    told.square().sum().backward()
    assert target.grad is None
    assert not masks.requires_grad


def test_all_layers_of_the_transformer_begin_alike():
    first, second = TransformerDecoder(8, 6, 2, 2).layers
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    assert first.linear1.weight is not second.linear1.weight
