"""The factorised energy of SmooSeg is the plain one, for any shapes, shifts and ranks."""

import pytest
import torch

from common import distributed
from losses.smoothness import data_term, pair_energy, smoothness, soft_labels
from tests.support.ranks import on_two_ranks

SHIFTS = {"within": -0.02, "across": 0.5}


def maps(pictures: int = 3, height: int = 4, width: int = 5, channels: int = 8, clusters: int = 6):
    draws = torch.Generator().manual_seed(0)
    features = torch.randn(pictures, channels, height, width, generator=draws, dtype=torch.float64) + 0.4
    cosines = torch.rand(pictures, clusters, height, width, generator=draws, dtype=torch.float64) * 2 - 1
    return features, cosines


def plain(features, labels, partners, pointwise):
    """Both energies from all pairs."""
    pairs = {"within": slice(None), "across": partners}
    return {
        kind: pair_energy((features, features[rows]), (labels, labels[rows]), SHIFTS[kind], pointwise)[0].mean()
        for kind, rows in pairs.items()
    }


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("partners", [[1, 2, 0], [2, 2, 0], [0, 1, 2]], ids=str)
def test_sums_give_what_all_pairs_give(partners, pointwise):
    features, cosines = maps()
    features[0, :, 1, 1] = 0  # a vector without a direction
    partners, found = torch.tensor(partners), []
    for energies in (
        lambda labels: smoothness(features, labels, partners, SHIFTS, pointwise=pointwise).energies,
        lambda labels: plain(features, labels, partners, pointwise),
    ):
        leaf = cosines.clone().requires_grad_()
        values = energies(soft_labels(leaf, 0.1))
        (values["within"] + 2 * values["across"]).backward()
        found.append([*(values[kind].detach() for kind in SHIFTS), leaf.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-14)


def test_features_are_constants():
    features, cosines = maps()
    features.requires_grad_()
    found = smoothness(features, soft_labels(cosines.requires_grad_(), 0.1), torch.tensor([1, 2, 0]), SHIFTS)
    sum(found.energies.values()).backward()
    assert features.grad is None
    assert cosines.grad.abs().sum() > 0


def test_discontinuities_are_those_of_all_pairs():
    features, cosines = maps()
    labels, partners = soft_labels(cosines, 0.1), torch.tensor([1, 2, 0])
    found = smoothness(features, labels, partners, SHIFTS).discontinuities
    for kind, rows in (("within", slice(None)), ("across", partners)):
        wanted = pair_energy((features, features[rows]), (labels, labels[rows]), 0.0)[1].mean()
        torch.testing.assert_close(found[kind], wanted)


def test_clusters_in_another_order_change_nothing():
    features, cosines = maps()
    partners = torch.tensor([1, 2, 0])
    one, two = (
        smoothness(features, soft_labels(values, 0.1), partners, SHIFTS).energies
        for values in (cosines, cosines.flip(1))
    )
    for kind in SHIFTS:
        torch.testing.assert_close(one[kind], two[kind], rtol=1e-12, atol=0)


@pytest.mark.parametrize("pointwise", [True, False])
def test_a_shift_is_asked_for_with_the_signal_at_the_places(pointwise):
    features, cosines = maps()
    partners, places, seen = torch.tensor([1, 2, 0]), torch.tensor([0, 7, 19]), {}

    def shift_of(kind, pairs):
        seen[kind] = pairs
        return torch.tensor(SHIFTS[kind], dtype=torch.float64)

    labels = soft_labels(cosines, 0.1)
    given = smoothness(features, labels, partners, SHIFTS, pointwise=pointwise)
    asked = smoothness(
        features, labels, partners, dict.fromkeys(SHIFTS), pointwise=pointwise, shift_of=shift_of, places=places
    )
    for kind, rows in (("within", slice(None)), ("across", partners)):
        assert torch.equal(asked.energies[kind], given.energies[kind])
        # At discontinuity 1 the energy is F - shift.
        flat = torch.zeros_like(labels), labels
        signal = pair_energy((features, features[rows]), flat, 0.0, pointwise)[0].flatten(1, 2).flatten(2)
        torch.testing.assert_close(seen[kind], signal[:, places][:, :, places])


def test_the_data_term_has_no_temperature_and_teaches_the_student_alone():
    student, teacher = (values.clone().requires_grad_() for values in maps()[1].chunk(2, dim=1))
    loss = data_term(student, teacher)
    loss.backward()
    best = teacher.argmax(1, keepdim=True)
    wanted = (student.logsumexp(1, keepdim=True) - student.gather(1, best)).mean()
    torch.testing.assert_close(loss, wanted)
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def halves(rank: int):
    """A rank's share of a batch of four pictures: its energies, their gradient, and the shift it was asked for."""
    features, cosines = maps(pictures=4)
    rows, partners = slice(2 * rank, 2 * rank + 2), torch.tensor([3, 0, 0, 2])
    leaf = cosines[rows].clone().requires_grad_()
    found = smoothness(
        features[rows],
        soft_labels(leaf, 0.1),
        partners[rows],
        {"within": None, "across": 0.5},
        average=distributed.mean,
        shift_of=lambda kind, pairs: distributed.mean(pairs.mean()),
        places=torch.arange(20),
    )
    total = sum(found.energies.values())
    total.backward()
    return distributed.mean(total), leaf.grad / 2, found.shifts["within"]


@pytest.mark.ddp
def test_two_ranks_equal_one():
    features, cosines = maps(pictures=4)
    leaf = cosines.clone().requires_grad_()
    found = smoothness(
        features,
        soft_labels(leaf, 0.1),
        torch.tensor([3, 0, 0, 2]),
        {"within": None, "across": 0.5},
        shift_of=lambda kind, pairs: pairs.mean(),
        places=torch.arange(20),
    )
    total = sum(found.energies.values())
    total.backward()
    ranks = on_two_ranks(halves)
    for value, _, shift in ranks:
        torch.testing.assert_close(value, total.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(shift, found.shifts["within"], rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat([grad for _, grad, _ in ranks]), leaf.grad, rtol=1e-10, atol=1e-15)
