"""The mutual information of shifts: equal to sums over pixels and pairs, whatever the way, the mask and the ranks."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import information as loss
from tests.support.ranks import on_two_ranks


def maps(pictures=3, classes=4, height=7, width=9, seed=0):
    draws = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, pictures, classes, height, width, generator=draws, dtype=torch.float64)
    return (2 * logits[0]).softmax(1), (2 * logits[0] + logits[1]).softmax(1)


def plain_joint(first, second, half_side):
    """Shift by shift."""
    found = []
    for y in range(-half_side, half_side + 1):
        for x in range(-half_side, half_side + 1):
            found.append(torch.einsum("nihw,njhw->ij", loss.shifted(first, x, y), second))
    return torch.stack(found)


@pytest.mark.parametrize("half_side", [0, 1, 2, 3, 5, 11])
def test_both_ways_to_the_joint_are_that_of_one_shift_after_the_other(half_side):
    first, second = (values.requires_grad_() for values in maps())
    wanted = plain_joint(first, second, half_side)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.autograd.grad((wanted * weights).sum(), (first, second))
    for way in (loss._by_pixels, loss._by_frequencies, loss.joint_of_shifts):
        joint = way(first, second, half_side)
        torch.testing.assert_close(joint, wanted)
        found = torch.autograd.grad((joint * weights).sum(), (first, second))
        torch.testing.assert_close(found, gradients)


@pytest.mark.parametrize("half_side", [0, 2, 11])
def test_the_joint_of_a_box_is_the_sum_over_its_shifts(half_side):
    first, second = (values.requires_grad_() for values in maps())
    found, wanted = loss.joint_of_box(first, second, half_side), plain_joint(first, second, half_side).sum(0)
    torch.testing.assert_close(found, wanted)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = (torch.autograd.grad((joint * weights).sum(), (first, second)) for joint in (found, wanted))
    torch.testing.assert_close(*gradients)


def test_information_of_counts_has_the_gradient_of_information_times_what_is_counted():
    """Where the maps are softmax outputs; a class that is never used takes no gradient in either."""
    logits = torch.randn(2, 3, 4, 7, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, :, 2] = -1000
    logits.requires_grad_()
    joint = loss.joint_of_box(*logits.softmax(2), 2)
    counted, plain = loss.information_of_counts(joint, 75), loss.information(joint[None], collapsed=True).loss
    total = float(joint.detach().sum())
    assert float(counted.detach()) == pytest.approx(total * (math.log(total) + float(plain.detach())) / 75)
    ours, theirs = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (plain, counted))
    torch.testing.assert_close(ours * total / 75, theirs)
    assert not theirs[:, :, 2].any()


@pytest.mark.parametrize("smallest", [loss.SMALLEST, 1e-2])
def test_pairs_below_the_smallest_pass_no_gradient_but_marginals_do(smallest):
    """As released: marginals are those of the joint before its small entries are lifted."""
    joint = torch.tensor([[0.5, 1e-3], [1e-3, 0.498]], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss.information_of_counts(joint, 1, smallest), joint)
    row = torch.tensor([0.501, 0.499], dtype=torch.float64)
    lifted = joint.detach().clamp_min(smallest)
    through_marginals = (lifted.sum(1) / row)[:, None] + lifted.sum(0) / row
    direct = row.log()[:, None] + row.log() - lifted.log() - 1
    wanted = through_marginals + torch.where(joint.detach() < smallest, 0.0, direct)
    torch.testing.assert_close(found, wanted)


def test_a_shift_reads_at_right_and_below_and_zeros_outside():
    values = torch.arange(12.0).view(1, 1, 3, 4)
    assert torch.equal(loss.shifted(values, 1, 2)[0, 0], torch.tensor([[9.0, 10, 11, 0], [0] * 4, [0] * 4]))
    assert torch.equal(loss.shifted(values, -1, 0)[0, 0, 1], torch.tensor([0.0, 4, 5, 6]))


@pytest.mark.parametrize("collapsed", [False, True])
@pytest.mark.parametrize("balance", [1.0, 1.5])
def test_it_is_information_plus_weighted_entropies(collapsed, balance):
    """-I - (balance - 1) (H_i + H_j) of each symmetric joint, and what one class for all and even classes give."""
    first, second = maps()
    joint = plain_joint(first, second, 1)
    joint = joint.sum(0, keepdim=True) if collapsed else joint
    joint = joint / joint.sum((1, 2), keepdim=True)
    joint = (joint + joint.mT) / 2
    rows = joint.sum(2)
    entropies = -(rows * rows.log()).sum(1)
    inner = (joint * (joint / (rows[:, :, None] * rows[:, None])).log()).sum((1, 2))
    found = loss.mutual_information(first, second, 1, balance, collapsed)
    torch.testing.assert_close(found.plain, -inner.mean())
    torch.testing.assert_close(found.loss, -(inner + 2 * (balance - 1) * entropies).mean())
    one = torch.zeros(2, 4, 8, 8)
    one[:, 0] = 1
    assert loss.mutual_information(one, one, 2, balance, collapsed).loss.abs() < 1e-6
    even = F.one_hot(torch.arange(4).repeat(16).view(1, 8, 8), 4).permute(0, 3, 1, 2).float()
    assert loss.mutual_information(even, even, 0, collapsed=collapsed).loss.item() == pytest.approx(-math.log(4))


def test_the_total_of_the_collapsed_joint_has_no_gradient():
    """As released: against the free maps the loss is one of a joint divided by a number."""
    first, second = maps()
    grown = first.clone().requires_grad_()
    joint = loss.joint_of_shifts(grown, second, 1)
    total = float(joint.detach().sum())
    (found,) = torch.autograd.grad(loss.information(joint, 1.0, True).loss, grown)
    inner = loss.joint_of_shifts(grown, second, 1).sum(0) / total
    inner = (inner + inner.T) / 2
    value = -(inner * (inner / (inner.sum(0) * inner.sum(1)[:, None])).log()).sum()
    torch.testing.assert_close(found, torch.autograd.grad(value, grown)[0])


@pytest.mark.parametrize("half_side", [1, 4])
def test_masked_pixels_are_not_looked_at(half_side):
    first, second = maps()
    mask = torch.rand(3, 7, 9, generator=torch.Generator().manual_seed(2)) > 0.4
    mask[1] = False
    found = loss.mutual_information(first, second, half_side, mask=mask)
    first[~mask[:, None].expand_as(first)] = 7.0
    torch.testing.assert_close(loss.mutual_information(first, second, half_side, mask=mask).loss, found.loss)
    without = loss.mutual_information(first[[0, 2]], second[[0, 2]], half_side, mask=mask[[0, 2]])
    torch.testing.assert_close(without.loss, found.loss)


def test_where_nothing_is_left_the_loss_is_zero_and_its_gradient_finite():
    first, second = (values.requires_grad_() for values in maps())
    nothing = loss.mutual_information(first, second, 4, mask=torch.zeros(3, 7, 9))
    assert not nothing.seen
    assert nothing.loss.item() == 0
    one = torch.zeros(3, 7, 9)
    one[0, 3, 3] = 1  # a single pixel: all shifts but none see nothing
    found = loss.mutual_information(first, second, 4, mask=one)
    assert found.seen
    found.loss.backward()
    assert torch.isfinite(first.grad).all()
    torch.testing.assert_close(found.loss, loss.mutual_information(first, second, 0, mask=one).loss)


def test_a_copy_is_brought_back_under_either_meaning_of_the_corners():
    first, second = maps(height=8, width=8)
    flip = torch.tensor([[[-1.0, 0, 0], [0, 1, 0]]]).expand(3, 2, 3)
    wanted = loss.mutual_information(first, second, 2).loss
    for corners in (True, False):
        found = loss.mutual_information(first, second.flip(3), 2, to_first=flip, align_corners=corners)
        torch.testing.assert_close(found.loss, wanted)
    moved = torch.tensor([[[1.0, 0, 0.5], [0, 1, 0]]]).expand(3, 2, 3)
    values = torch.arange(8.0).expand(3, 1, 8, 8)
    centres, edges = (loss.brought_back(values, moved, corners)[0, 0, 0, 0].item() for corners in (True, False))
    assert (centres, edges) == pytest.approx((1.75, 2.0))  # a quarter of 7 px between centres, of 8 between edges


def halves(rank):
    """The loss and the gradients of this rank's pictures."""
    first, second = (values[2 * rank : 2 * rank + 2].clone().requires_grad_() for values in maps(pictures=4))
    found = loss.mutual_information(first, second, 3, 1.5)
    found.loss.backward()
    return found.loss.detach(), first.grad, second.grad


def test_the_joint_of_two_ranks_is_that_of_one():
    """Each rank has the loss of all pictures, and gradients whose mean over ranks (as DDP takes it) is that of one."""
    parts = on_two_ranks(halves)
    first, second = (values.requires_grad_() for values in maps(pictures=4))
    found = loss.mutual_information(first, second, 3, 1.5)
    found.loss.backward()
    for rank, (value, *gradients) in enumerate(parts):
        torch.testing.assert_close(value, found.loss.detach())
        for gradient, whole in zip(gradients, (first.grad, second.grad), strict=True):
            torch.testing.assert_close(gradient / 2, whole[2 * rank : 2 * rank + 2])


def test_it_is_float32_under_autocast():
    first, second = (values.float() for values in maps())
    wanted = loss.mutual_information(first, second, 3).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss.mutual_information(first, second, 3).loss
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
