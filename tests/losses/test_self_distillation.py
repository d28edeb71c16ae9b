"""The losses against their formulas, written out with loops in float64; schedules, centres and Sinkhorn's shares."""

import math

import pytest
import torch
from torch.nn import functional as F

from losses import self_distillation as distil


def rows(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_every_target_meets_every_view_but_its_own():
    student, temperature = rows(5, 3, 7), 0.1
    targets = F.softmax(rows(2, 3, 7, seed=1) / 0.04, dim=-1)
    total, pairs = 0.0, 0
    for i in range(2):
        for v in range(5):
            if v == i:
                continue
            for b in range(3):
                e = [math.exp(x / temperature) for x in student[v, b].tolist()]
                total -= sum(q * math.log(x / sum(e)) for q, x in zip(targets[i, b].tolist(), e, strict=True)) / 3
            pairs += 1
    assert pairs == 8
    assert distil.multi_crop_loss(student, targets, temperature).item() == pytest.approx(total / pairs, rel=1e-5)


def test_without_small_crops_each_large_one_meets_the_other():
    student = rows(2, 4, 6).requires_grad_()
    targets = F.softmax(rows(2, 4, 6, seed=1), dim=-1)
    targets[0] = 0  # then only the pair (target 1, view 0) is left
    distil.multi_crop_loss(student, targets, 0.1).backward()
    assert student.grad[0].abs().sum() > 0
    assert student.grad[1].abs().sum() == 0


def test_gradient_of_the_crops_is_that_of_the_formula():
    student = rows(4, 2, 5).requires_grad_()
    targets = F.softmax(rows(2, 2, 5, seed=3), dim=-1)
    loss = distil.multi_crop_loss(student, targets, 0.1)
    (found,) = torch.autograd.grad(loss, student)
    log_p = F.log_softmax(student / 0.1, dim=-1)
    plain = sum(
        -(targets[i] * log_p[v]).sum(-1).mean() for i in range(2) for v in range(4) if v != i
    ) / 6  # fmt: skip
    (expected,) = torch.autograd.grad(plain, student)
    assert torch.allclose(found, expected, atol=1e-6)


def test_masked_patches_count_by_picture():
    mask = torch.zeros(3, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 1, 1] = mask[2, 0, 1] = True
    student, targets = rows(3, 5), F.softmax(rows(3, 5, seed=1), dim=-1)
    each = [-(targets[n] * F.log_softmax(student[n] / 0.2, dim=-1)).sum().item() for n in range(3)]
    expected = ((each[0] + each[1]) / 2 + 0 + each[2]) / 3
    assert distil.masked_patch_loss(student, targets, mask, 0.2).item() == pytest.approx(expected, rel=1e-5)
    nothing = distil.masked_patch_loss(student[:0].requires_grad_(), targets[:0], torch.zeros(3, 2, 2).bool(), 0.2)
    assert nothing.item() == 0


def test_targets_are_centred_sharpened_and_without_gradient():
    logits, centre = rows(4, 6).float().requires_grad_(), rows(6, seed=2).float()
    targets = distil.centred_targets(logits, centre, 0.05)
    assert not targets.requires_grad
    assert torch.allclose(targets, ((logits - centre) / 0.05).softmax(-1))
    assert torch.allclose(distil.centred_targets(centre.expand(2, 6), centre, 0.05), torch.full((2, 6), 1 / 6))


def test_the_centre_moves_to_the_mean_and_stays_without_rows():
    logits, centre = rows(4, 6).float(), torch.ones(6)
    moved = distil.moved_centre(centre, logits, 0.9)
    assert torch.allclose(moved, 0.9 * centre + 0.1 * logits.mean(0))
    assert torch.equal(distil.moved_centre(centre, logits[:0], 0.9), centre)


def test_sinkhorn_gives_every_prototype_its_share():
    logits = rows(200, 5).float()
    logits[:, 0] += 3  # without it the first prototype wins nearly everything
    assert (logits / 0.5).softmax(-1).mean(0)[0] > 0.8
    targets = distil.sinkhorn_targets(logits, 0.5, iterations=30)
    assert torch.allclose(targets.sum(1), torch.ones(200), atol=1e-5)
    assert torch.allclose(targets.mean(0), torch.full((5,), 0.2), atol=1e-3)
    assert distil.sinkhorn_targets(logits[:0], 0.5).shape == (0, 5)


def test_health_of_plain_cases():
    same = F.one_hot(torch.zeros(8, dtype=torch.long), 16).float()
    different = F.one_hot(torch.arange(8), 16).float()
    uniform = torch.full((8, 16), 1 / 16)
    assert [round(float(value), 4) for value in distil.entropies(same)] == [0, 0]
    assert [round(float(value), 4) for value in distil.entropies(different)] == [0, 0.75]
    assert float(distil.entropies(uniform)[0]) == pytest.approx(1)
    assert float(distil.spread(torch.ones(4, 3))) == pytest.approx(0, abs=1e-6)
    assert float(distil.spread(rows(500, 32))) == pytest.approx(1, abs=0.05)


def test_patches_are_centred_within_their_picture():
    logits, counts = rows(6, 4), torch.tensor([2, 0, 3, 1])
    found = distil.centred_within(logits, counts)
    assert torch.allclose(found[:2], (logits[:2] - logits[:2].mean(0)).float())
    assert torch.allclose(found[2:5], (logits[2:5] - logits[2:5].mean(0)).float())
    assert not found[5].any()  # alone in its picture
    lit = logits.clone()
    lit[2:5] += 3 * rows(1, 4, seed=1)  # something that all patches of a picture share changes nothing
    assert torch.allclose(distil.centred_within(lit, counts), found, atol=1e-5)
    assert distil.centred_within(logits[:0], torch.zeros(3, dtype=torch.long)).shape == (0, 4)
