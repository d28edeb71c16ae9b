"""The momentum copy."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from models.momentum import Momentum, warmed_up


def pair():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return module, Momentum(module)


def move(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)


def test_starts_equal_and_gets_no_gradient():
    module, momentum = pair()
    rows = torch.ones(4, 3)
    module.eval()
    momentum.eval()
    torch.testing.assert_close(momentum(rows), module(rows).detach())
    assert not momentum(rows).requires_grad
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_update_is_the_moving_average_of_weights_and_takes_buffers_over():
    module, momentum = pair()
    before = [parameter.clone() for parameter in module.parameters()]
    move(module)
    module[1].running_mean.fill_(5.0)
    momentum.update(0.9)
    for old, new, slow in zip(before, module.parameters(), momentum.copy.parameters(), strict=True):
        torch.testing.assert_close(slow, 0.9 * old + 0.1 * new)
    assert (momentum.copy[1].running_mean == 5).all()
    momentum.update(0.0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), momentum.copy.parameters(), strict=True))


def test_state_dict_holds_the_copy_once_and_restores_it():
    module, momentum = pair()
    assert set(momentum.state_dict()) == {f"copy.{name}" for name in module.state_dict()}
    move(module)
    momentum.update(0.5)
    other_module, other = pair()
    other.load_state_dict(momentum.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(momentum.parameters(), other.parameters(), strict=True))
    move(other_module)
    other.update(0.0)  # still follows its own module
    assert all(torch.equal(a, b) for a, b in zip(other_module.parameters(), other.copy.parameters(), strict=True))


def test_a_wrong_momentum_is_named():
    _, momentum = pair()
    with pytest.raises(ConfigError) as caught:
        momentum.update(1.5)
    assert str(caught.value) == "momentum m = 1.5: must lie in [0, 1]; 1 keeps the copy as it is"


def test_an_average_begins_as_a_mean_and_goes_on_with_its_momentum():
    found = [warmed_up(count, 0.98) for count in (1, 2, 3, 4, 50, 51, 1000)]
    assert found == pytest.approx([0, 0, 2 / 3, 3 / 4, 0.98, 0.98, 0.98])
    module, momentum = pair()
    states = []
    for count in range(1, 7):
        move(module)
        momentum.update(warmed_up(count, 0.98))
        states.append(module[0].weight.detach().clone())
    torch.testing.assert_close(momentum.copy[0].weight, (2 * states[1] + sum(states[2:])) / 6)


def test_an_average_of_what_stands_still_is_it():
    module, momentum = pair()
    for count in range(1, 51):
        momentum.update(warmed_up(count, 0.98))
    torch.testing.assert_close(momentum.copy[0].weight, module[0].weight, rtol=1e-6, atol=1e-7)
