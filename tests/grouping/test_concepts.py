"""Concept maps against one backward per concept through the class token's path."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grouping import concepts


@pytest.mark.parametrize("power", [1.0, 0.5, 0.0])
def test_all_concepts_at_once_equal_one_backward_each(power):
    generator = torch.Generator().manual_seed(0)
    attention = torch.randn(2, 3, 10, 10, generator=generator).softmax(3).requires_grad_()
    values, centroids = torch.randn(2, 3, 10, 4, generator=generator), torch.randn(5, 12, generator=generator)
    path = nn.Sequential(nn.Linear(12, 12), nn.GELU(), nn.LayerNorm(12))
    found = concepts.class_row_gradient(attention[:, :, 0], values, centroids, path, divisor=2, power=power)
    assert path[0].weight.grad is None
    for number, centroid in enumerate(centroids):
        token = path((attention @ values)[:, :, 0].flatten(1))
        token = token / token.norm(dim=1, keepdim=True) ** power
        loss = (1 - token @ F.normalize(centroid, dim=0)).mean()
        wanted = torch.autograd.grad(loss, attention)[0].mean(1)[:, 0, 1:]
        torch.testing.assert_close(found[:, number], wanted, rtol=1e-4, atol=1e-7)
    alone = concepts.class_row_gradient(attention[1:, :, 0], values[1:], centroids, path, power=power)
    torch.testing.assert_close(alone[0], 2 * found[1], rtol=1e-4, atol=1e-7)


def test_kept_mass():
    values = torch.tensor([[4.0, 1.0, 5.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    wanted = [[True, False, True, False], [False] * 4, [True] * 4]
    assert concepts.kept_mass(values, 0.8).tolist() == wanted
    assert concepts.kept_mass(torch.tensor([3.0]), 0.8).tolist() == [True]


def test_maps_are_zero_against_a_concept_and_attention_with_evidence_for_it():
    attention = torch.tensor([[[0.2, 0.4, 0.2, 0.2]]])
    gradient = torch.tensor([[[-0.9, 0.3, -0.1], [0.0, 0.0, 0.0]]])
    found = concepts.concept_maps(attention, gradient)
    torch.testing.assert_close(found, torch.tensor([[[1.9, 0.0, 0.5], [1.0, 0.5, 0.5]]]))
