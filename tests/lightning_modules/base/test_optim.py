"""One optimiser object for several algorithms: equal to its parts, skippable, resumable; schedules at their ends."""

import copy
import math

import pytest
import torch
from torch import nn

from lightning_modules.base.optim import CompositeOptimizer, schedule_factor, scheduled


def groups(nets: dict[str, nn.Module]) -> list[dict]:
    settings = {
        "head": {"optimizer": "adamw", "lr": 0.1, "weight_decay": 0.3, "owner": "method"},
        "projection": {"optimizer": "sgd", "lr": 0.2, "weight_decay": 0.0, "owner": "method"},
        "probe": {"optimizer": "adam", "lr": 0.05, "weight_decay": 0.1, "owner": "probe"},
    }
    extra = {"schedule": "constant", "warmup": 0, "clip_norm": None, "clip_value": None}
    return [{"name": name, "params": nets[name].parameters(), **settings[name], **extra} for name in settings]


def make_nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {name: nn.Linear(4, 3) for name in ("head", "projection", "probe")}


def backward(nets: dict[str, nn.Module], seed: int) -> None:
    data = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
    sum(net(data).square().sum() for net in nets.values()).backward()


def weights(nets: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    return {name: net.weight.detach().clone() for name, net in nets.items()}


def test_steps_equal_those_of_separate_optimisers():
    ours, theirs = make_nets(), make_nets()
    composite = CompositeOptimizer(groups(ours))
    separate = [
        torch.optim.AdamW(theirs["head"].parameters(), lr=0.1, weight_decay=0.3),
        torch.optim.SGD(theirs["projection"].parameters(), lr=0.2),
        torch.optim.Adam(theirs["probe"].parameters(), lr=0.05, weight_decay=0.1),
    ]
    for seed in range(3):
        for nets, optimisers in ((ours, [composite]), (theirs, separate)):
            for optimiser in optimisers:
                optimiser.zero_grad()
            backward(nets, seed)
            for optimiser in optimisers:
                optimiser.step()
    for name in ours:
        assert torch.equal(ours[name].weight, theirs[name].weight)


def test_skip_leaves_weights_and_state_of_the_method_alone():
    nets = make_nets()
    optimiser = CompositeOptimizer(groups(nets))
    backward(nets, 0)
    optimiser.step()
    before, state = weights(nets), copy.deepcopy(optimiser.state_dict())
    optimiser.skip_method = True
    optimiser.zero_grad()
    backward(nets, 1)
    optimiser.step()
    after = weights(nets)
    assert torch.equal(before["head"], after["head"])  # AdamW's decay would have moved it even at zero gradient
    assert torch.equal(before["projection"], after["projection"])
    assert not torch.equal(before["probe"], after["probe"])
    adamw = next(child for child in optimiser.children if isinstance(child, torch.optim.AdamW))
    kept = state["children"][optimiser.children.index(adamw)]["state"][0]
    assert torch.equal(adamw.state[nets["head"].weight]["exp_avg"], kept["exp_avg"])


def test_a_restored_optimiser_goes_on_equally():
    nets = make_nets()
    optimiser = CompositeOptimizer(groups(nets))
    backward(nets, 0)
    optimiser.step()
    saved, saved_nets = copy.deepcopy(optimiser.state_dict()), copy.deepcopy(nets)
    other = CompositeOptimizer(groups(saved_nets))
    other.load_state_dict(saved)
    for each, each_nets in ((optimiser, nets), (other, saved_nets)):
        each.zero_grad()
        backward(each_nets, 1)
        each.step()
    for name in nets:
        assert torch.equal(nets[name].weight, saved_nets[name].weight)
    other.param_groups[0]["lr"] = 0.0  # the groups we show are still those that step
    assert other.children[0].param_groups[0]["lr"] == 0.0


def test_joined_state_writes_through():
    nets = make_nets()
    optimiser = CompositeOptimizer(groups(nets))
    backward(nets, 0)
    optimiser.step()
    assert len(optimiser.state) == sum(len(child.state) for child in optimiser.children)
    parameter = nets["probe"].weight
    optimiser.state[parameter] = {"step": torch.tensor(7.0)}
    owner = next(child for child in optimiser.children if parameter in child.state)
    assert owner.state[parameter]["step"] == 7


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("constant", 0, 1.0),
        ("constant", 99, 1.0),
        ("linear", 0, 1.0),
        ("linear", 50, 0.5),
        ("linear", 100, 0.0),
        ("cosine", 0, 1.0),
        ("cosine", 50, 0.5),
        ("cosine", 100, 0.0),
        ("cosine", 120, 0.0),
    ],
)
def test_schedules_at_their_ends(schedule, step, expected):
    assert math.isclose(schedule_factor(schedule, step, 100), expected, abs_tol=1e-12)


def test_exponential_decay_begins_behind_a_warm_up_from_nothing():
    """DINOSAUR's: the first step has no rate at all, the rate halves in every `decay_steps`, between them smoothly."""
    group = {
        "schedule": "exponential",
        "warmup": 10,
        "warmup_from": 0.0,
        "drop": 0.5,
        "decay_steps": 20,
        "base_lr": 2.0,
    }
    rates = [scheduled(group, step, 100)["lr"] for step in (0, 1, 5, 10, 30, 40, 50)]
    assert rates == pytest.approx([0, 0.2, 1, 2, 1, 2 * 0.5**1.5, 0.5], abs=1e-12)


def test_poly_and_step_fall_as_released():
    """HSG's release: warm-up from a tenth, drops at shares of the run, rounded down; poly under the warm-up."""
    released = {"warmup": 10, "warmup_from": 0.1}
    assert [schedule_factor("step", at, 100, **released) for at in (0, 5, 10, 31)] == [0.1, 0.55, 1.0, 1.0]
    for at, passed in ((32, 1), (55, 1), (56, 2), (75, 3), (99, 3)):
        assert math.isclose(schedule_factor("step", at, 100), 0.1**passed)
    assert schedule_factor("step", 50, 100, milestones=(0.5,), drop=0.5) == 0.5
    assert math.isclose(schedule_factor("poly", 25, 100), 0.75**0.9)
    assert math.isclose(schedule_factor("poly", 25, 100, power=2.0), 0.75**2)
    assert schedule_factor("poly", 5, 100, **released) == 0.55
    assert math.isclose(schedule_factor("poly", 5, 10, **released), 0.5**0.9)
    assert schedule_factor("poly", 120, 100) == 0.0
    group = {"schedule": "poly", "warmup": 0, "base_lr": 2.0, "power": 1.0}
    assert scheduled(group, 50, 100) == {"lr": 1.0}
    rates = [scheduled({**group, "hold": 25}, step, 100)["lr"] for step in (0, 24, 25, 49, 99)]
    assert rates == [2.0, 2.0, 1.5, 1.5, 0.5]


def test_warm_up_is_linear_and_ends_at_one():
    assert [schedule_factor("constant", step, 100, warmup=4) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert schedule_factor("cosine", 4, 104, warmup=4) == 1.0
