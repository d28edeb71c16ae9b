"""Slots find themselves in the other crop, among the slots of all pictures and processes; nothing to find gives 0."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.distributed import EVERYONE, Reach
from losses.representations.slot_contrast import place_distillation, slot_contrast
from tests.support.ranks import on_two_ranks


def drawn(pictures=4, count=5, dim=3, seed=0):
    draws = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(pictures, count, dim, generator=draws) for _ in range(2))
    candidates = torch.rand(pictures, count, generator=draws) < 0.7
    anchors = candidates & (torch.rand(pictures, count, generator=draws) < 0.7)
    return student, teacher, anchors, candidates


def test_each_anchor_is_told_from_the_slots_of_all_pictures():
    student, teacher, anchors, candidates = drawn()
    layer = nn.Linear(3, 3)
    losses = []
    for picture, slot in anchors.nonzero().tolist():
        query = F.normalize(layer(student[picture, slot]), dim=0)
        cosines = {
            place: query @ F.normalize(teacher[place], dim=0) for place in map(tuple, candidates.nonzero().tolist())
        }
        whole = torch.stack(list(cosines.values())) / 0.3
        losses.append(whole.logsumexp(0) - cosines[picture, slot] / 0.3)
    found = slot_contrast(student, teacher, anchors, candidates, layer, 0.3)
    assert torch.allclose(found, 0.6 * torch.stack(losses).mean(), rtol=1e-5)


def test_the_predictor_sees_the_anchors_alone_and_no_gradient_reaches_the_teacher():
    student, teacher, anchors, candidates = drawn()
    seen = []

    def predictor(rows):
        seen.append(rows)
        return rows

    student.requires_grad_(), teacher.requires_grad_()
    slot_contrast(student, teacher, anchors, candidates, predictor, 0.2).backward()
    assert torch.equal(seen[0], student[anchors])
    assert teacher.grad is None
    assert torch.equal(student.grad.abs().sum(2) > 0, anchors)


def test_without_an_anchor_the_loss_is_0_and_so_are_its_gradients():
    student, teacher, _, candidates = drawn()
    layer = nn.Linear(3, 3)
    student.requires_grad_()
    loss = slot_contrast(student, teacher, torch.zeros_like(candidates), candidates, layer, 0.2)
    loss.backward()
    assert loss == 0
    for value in (student, layer.weight, layer.bias):
        assert torch.equal(value.grad, torch.zeros_like(value))


def ranked(rank, per_rank, anchors):
    parts = [part.chunk(2)[rank] for part in (*drawn()[:2], anchors, drawn()[3])]
    parts[0] = parts[0].clone().requires_grad_()
    loss = slot_contrast(*parts, nn.Identity(), 0.2, EVERYONE, per_rank)
    loss.backward()
    return loss.item(), parts[0].grad


@pytest.mark.ddp
@pytest.mark.parametrize("empty", [False, True])
def test_two_processes_have_the_mean_of_all_anchors(empty):
    """Also where one of them has none."""
    student, teacher, anchors, candidates = drawn()
    if empty:
        anchors[:2] = False
    student.requires_grad_()
    whole = slot_contrast(student, teacher, anchors, candidates, nn.Identity(), 0.2)
    whole.backward()
    ranks = on_two_ranks(ranked, False, anchors)
    assert sum(loss for loss, _ in ranks) / 2 == pytest.approx(whole.item(), rel=1e-5)
    assert torch.allclose(torch.cat([grad for _, grad in ranks]) / 2, student.grad, atol=1e-6)
    if empty:
        assert ranks[0][0] == 0
        released = on_two_ranks(ranked, True, anchors)
        assert released[1][0] == pytest.approx(whole.item(), rel=1e-5)  # its own mean, whatever the other one has


def test_a_local_reach_compares_with_its_own_pictures():
    student, teacher, anchors, candidates = drawn()
    one = slot_contrast(student, teacher, anchors, candidates, nn.Identity(), 0.2, Reach(local=True))
    assert torch.equal(one, slot_contrast(student, teacher, anchors, candidates, nn.Identity(), 0.2))


def test_places_are_compared_after_centring_and_sharpening():
    student, teacher, centre = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.randn(3)
    targets = ((teacher - centre[:, None, None]) / 0.07).softmax(1)
    wanted = -(targets * (student / 0.1).log_softmax(1)).sum(1).mean()
    assert torch.allclose(place_distillation(student, teacher, centre, 0.1, 0.07), wanted, rtol=1e-5)
    rows = [maps.movedim(1, -1).flatten(0, 2) for maps in (student, teacher)]
    assert torch.allclose(place_distillation(*rows, centre[None], 0.1, 0.07), wanted, rtol=1e-5)


def test_places_that_nobody_sees_teach_nothing():
    student = torch.zeros(1, 4, 2, 2, requires_grad=True)
    loss = place_distillation(student, torch.zeros(1, 4, 2, 2), torch.zeros(4), 0.1, 0.07)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert student.grad.abs().max() < 1e-7
