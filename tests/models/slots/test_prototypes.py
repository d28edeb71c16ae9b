"""Pixels are gathered into slots by what they resemble; what wins nothing, and what has no length, does no harm."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ConfigError
from models.slots import prototypes as slots


def test_slots_are_means_of_raw_pixels_under_soft_assignments():
    maps, prototypes = torch.randn(2, 5, 3, 4), torch.randn(6, 5)
    found = slots.group(maps, prototypes, 0.2, 1e-3)
    for picture in range(2):
        pixels = maps[picture].flatten(1).T
        scores = F.cosine_similarity(pixels[:, None], prototypes[None], dim=2)
        shares = (scores / 0.2).softmax(1) + 1e-3
        wanted = torch.stack([(share[:, None] * pixels).sum(0) / share.sum() for share in shares.T])
        assert torch.allclose(found.vectors[picture], wanted, atol=1e-5)
        assert torch.allclose(found.scores[picture].flatten(1).T, scores, atol=1e-6)


def test_permuted_prototypes_permute_slots_and_scores():
    maps, prototypes, order = torch.randn(2, 5, 3, 4), torch.randn(6, 5), torch.randperm(6)
    one, two = slots.group(maps, prototypes, 0.1), slots.group(maps, prototypes[order], 0.1)
    assert torch.allclose(one.vectors[:, order], two.vectors, atol=1e-5)
    assert torch.allclose(one.scores[:, order], two.scores, atol=1e-6)


def test_a_prototype_that_owns_nothing_has_the_mean_of_the_picture():
    maps = torch.randn(1, 3, 4, 4).abs()
    found = slots.group(maps, torch.stack([torch.ones(3), -torch.ones(3)]), 0.01)
    assert torch.allclose(found.vectors[0, 1], maps.mean((0, 2, 3)), atol=1e-3)


def test_a_pixel_of_length_zero_has_no_gradient():
    maps = torch.randn(1, 3, 2, 2)
    maps[..., 0, 0] = 0
    maps.requires_grad_()
    slots.group(maps, torch.randn(4, 3), 0.1).scores.square().sum().backward()
    assert torch.equal(maps.grad[..., 0, 0], torch.zeros(1, 3))
    assert maps.grad.abs().max() < 100


def test_a_slot_is_there_where_it_wins_a_pixel():
    scores = torch.zeros(2, 3, 1, 2)
    scores[0, 2, 0, 0] = scores[0, 1, 0, 1] = scores[1, 0] = 1
    assert torch.equal(slots.winners(scores), torch.tensor([[0.0, 1, 1], [2, 0, 0]]))


def test_pictures_are_ranked_by_the_pixels_that_a_prototype_wins():
    """A picture that shows a little of it well comes before one that shows much of it badly."""
    scores = torch.full((3, 2, 1, 4), 0.2)
    scores[0, 0, 0, 0] = 0.9
    scores[1, 0] = 0.5
    scores[:, 1][scores[:, 0] < 0.4] = 0.3
    found = slots.picture_scores(scores)
    assert found[:, 0].argsort(descending=True).tolist() == [0, 1, 2]
    assert found[0, 0] == pytest.approx(0.9, abs=1e-4)
    assert found[2, 0] == pytest.approx(0.2, abs=1e-4)  # it wins none there: its mean over the picture


@pytest.mark.parametrize("norm", slots.NORMS)
def test_a_head_sees_each_pixel_alone(norm):
    head = slots.PrototypeHead(5, 8, 4, 3, norm).eval()
    maps = torch.randn(2, 5, 3, 4)
    found = head(maps)
    assert found.shape == (2, 4, 3, 4)
    assert torch.allclose(found[1, :, 2, 1], head.projector(maps[1, :, 2, 1][None])[0], atol=1e-6)
    assert head.prototypes.shape == (3, 4)
    assert all(layer.bias.eq(0).all() for layer in head.projector if isinstance(layer, nn.Linear))


def test_batch_norms_take_running_statistics_where_there_is_no_batch():
    mlp = slots.ProjectionMLP(3, 6, 4, "batch").train()
    mlp(torch.randn(20, 3) * 3 + 1)
    before = mlp[1].running_mean.clone()
    row = torch.randn(1, 3)
    one = mlp(row)
    assert torch.equal(mlp[1].running_mean, before)
    assert mlp(torch.zeros(0, 3)).shape == (0, 4)
    assert torch.allclose(one, mlp.eval()(row))
    two = mlp.train()(torch.randn(2, 3))
    assert torch.isfinite(two).all()
    assert not torch.equal(mlp[1].running_mean, before)


def test_an_unknown_norm_is_named():
    with pytest.raises(ConfigError, match=r"^method\.head\.norm=group: "):
        slots.ProjectionMLP(3, 6, 4, "group")
