"""LARS: the step of a matrix is in proportion to its length, vectors take plain momentum, and nothing divides by 0."""

import torch
from torch import nn

from lightning_modules.base.lars import Lars


def stepped(weight, gradient, **settings):
    parameter = nn.Parameter(weight.clone())
    parameter.grad = gradient
    Lars([parameter], lr=2.0, **settings).step()
    return weight - parameter.detach()


def test_the_step_of_a_matrix_has_the_length_of_its_weights():
    weight, gradient = torch.randn(3, 4), torch.randn(3, 4)
    for scale in (1e-3, 1.0, 1e3):
        step = stepped(weight, gradient * scale, eta=0.1)
        assert torch.allclose(step.norm(), 0.2 * weight.norm(), rtol=1e-5)
        assert torch.allclose(step / step.norm(), gradient / gradient.norm(), atol=1e-6)
    decayed = stepped(weight, gradient, eta=0.1, weight_decay=0.5)
    wanted = gradient + 0.5 * weight
    assert torch.allclose(decayed, 0.2 * weight.norm() * wanted / wanted.norm(), atol=1e-6)


def test_vectors_are_neither_scaled_nor_decayed():
    weight, gradient = torch.randn(5), torch.randn(5)
    assert torch.allclose(stepped(weight, gradient, weight_decay=0.5), 2 * gradient, atol=1e-6)


def test_what_has_no_length_is_not_divided_by():
    zero, one = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(stepped(zero, one), 2 * one * -1 * -1)
    assert torch.equal(stepped(one, zero), zero)
    assert torch.equal(stepped(zero, zero, weight_decay=0.1), zero)


def test_momentum_adds_scaled_gradients():
    parameter = nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = Lars([parameter], lr=1.0, momentum=0.5, eta=0.1)
    for _ in range(2):
        parameter.grad = torch.ones(2, 2)
        optimizer.step()
    first = 0.1 * 3  # of every entry: |w| = 6, |g| = 2
    second = 0.5 * first + 0.1 * (3 - first)
    assert torch.allclose(parameter, torch.full((2, 2), 3 - first - second))
    parameter.grad = None
    optimizer.step()
    assert torch.allclose(parameter, torch.full((2, 2), 3 - first - second))
