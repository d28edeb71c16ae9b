"""The consistency loss of HP."""

import torch
import torch.nn.functional as F

from losses.consistency import consistency


def test_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    z, other = (F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    expected = sum(((a - b + 1e-6) ** 2).sum() ** 0.5 for a, b in zip(z, other, strict=True)) / 7
    torch.testing.assert_close(consistency(z, other), expected)


def test_gradient_reaches_both_and_is_finite_for_equal_pairs():
    generator = torch.Generator().manual_seed(1)
    z = F.normalize(torch.randn(4, 5, generator=generator), dim=1)
    first, second = z.clone().requires_grad_(), z.roll(1, 0).clone().requires_grad_()
    second.data[0] = first.data[0]
    consistency(first, second).backward()
    torch.testing.assert_close(first.grad, -second.grad)
    assert first.grad.isfinite().all()
    assert (first.grad[1:].abs().sum(1) > 0).all()
