"""The correspondence with a shift of the batch: means in blocks are the plain formula, its gradient is as named."""

import pytest
import torch

from common import distributed
from common.errors import ConfigError
from losses.adaptive_shift import ShiftRule, adaptive_correspondence
from losses.correspondence import CEILING, cosines, signal
from tests.support.ranks import on_two_ranks


def maps(pictures: int = 4, height: int = 3, width: int = 5):
    draws = torch.Generator().manual_seed(0)
    features = [torch.randn(pictures, 6, height, width, generator=draws, dtype=torch.float64) + 0.5 for _ in range(2)]
    codes = [torch.randn(pictures, 4, height, width, generator=draws, dtype=torch.float64) + 0.3 for _ in range(2)]
    return tuple(features), tuple(codes)


def leaves(codes):
    return tuple(code.clone().requires_grad_() for code in codes)


def plain(features, codes, rule, positive, pointwise, clamped):
    """The formula as it is written, from all pairs of places."""
    wanted, found = signal(*features, pointwise), cosines(*codes)
    low, high = (0.0, CEILING) if clamped else (-1e4, None)
    mean = cosines(*features).mean()
    shift = (mean - found.mean() - rule.bias).abs() if positive else (mean + found.mean() - rule.bias) * rule.scale
    shift = shift.detach() if rule.gradient == "detached" else shift
    return (-found.clamp(low, high) * (wanted - shift)).mean(), shift


@pytest.mark.parametrize("gradient", ["released", "detached"])
@pytest.mark.parametrize("clamped", [True, False])
@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("block", [1, 500, 1 << 24])
def test_means_in_blocks_are_the_plain_formula(block, positive, pointwise, clamped, gradient):
    features, codes = maps()
    rule = ShiftRule(2.5, 0.1, gradient)
    ours, theirs = leaves(codes), leaves(codes)
    found = adaptive_correspondence(
        features, ours, rule, positive, pointwise=pointwise, zero_clamp=clamped, stabilize=clamped, block=block
    )
    loss, shift = plain(features, theirs, rule, positive, pointwise, clamped)
    found.loss.backward()
    loss.backward()
    torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.shift, shift, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.similarity, cosines(*codes).mean(), rtol=1e-12, atol=0)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-10, atol=1e-15)


def test_the_gradient_through_the_shift_counts():
    features, codes = maps()
    gradients = []
    for word in ("released", "detached"):
        own = leaves(codes)
        adaptive_correspondence(features, own, ShiftRule(gradient=word), positive=False).loss.backward()
        gradients.append(own[0].grad)
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()
    with pytest.raises(ConfigError, match=r"^method\.shift\.gradient=half: "):
        ShiftRule(gradient="half")


def test_pictures_of_other_sizes_and_of_no_square_meet():
    (features, _), (codes, _) = maps()
    (_, others), (_, of_others) = maps(height=2, width=7)
    rule = ShiftRule()
    found = adaptive_correspondence((features, others), (codes, of_others), rule, positive=True)
    loss, _ = plain((features, others), (codes, of_others), rule, True, True, True)
    torch.testing.assert_close(found.loss, loss, rtol=1e-12, atol=0)


def mean(values):
    return distributed.gather(values[None], grad=True).mean(0)


def half(rank: int):
    features, codes = maps()
    rows = slice(2 * rank, 2 * rank + 2)
    own = leaves(code[rows] for code in codes)
    found = adaptive_correspondence([f[rows] for f in features], own, ShiftRule(), positive=False, average=mean)
    found.loss.backward()
    return distributed.mean(found.loss), found.shift.detach(), own[0].grad / 2


@pytest.mark.ddp
def test_two_ranks_equal_one():
    features, codes = maps()
    own = leaves(codes)
    found = adaptive_correspondence(features, own, ShiftRule(), positive=False)
    found.loss.backward()
    ranks = on_two_ranks(half)
    for loss, shift, _ in ranks:
        torch.testing.assert_close(loss, found.loss.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(shift, found.shift.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, _, grad in ranks]), own[0].grad, rtol=1e-10, atol=1e-15)
