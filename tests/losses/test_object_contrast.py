"""The object loss: medoids in row blocks are those of all distances, and what counts is what the text says."""

import pytest
import torch
from torch.nn import functional as F

from losses import object_contrast as losses


def rows(groups: int = 3, size: int = 20, dim: int = 5, ids: int = 6):
    draws = torch.Generator().manual_seed(0)
    points = F.normalize(torch.randn(groups, size, dim, generator=draws), dim=2)
    labels = torch.randint(ids - 1, (groups, size), generator=draws)  # the last id never occurs
    return points, labels


def plain_medoids(points, labels, ids):
    found = torch.full((len(points), ids), -1)
    for group, (own, names) in enumerate(zip(points.double(), labels, strict=True)):
        for name in names.unique():
            members = (names == name).nonzero()[:, 0]
            sums = torch.cdist(own[members], own[members], compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            found[group, name] = members[(sums <= sums.min() * (1 + 1e-9)).nonzero()[0, 0]]
    return found


@pytest.mark.parametrize("block", [1, 7, 512])
@pytest.mark.parametrize("groups", [1, 3])
def test_medoids_in_blocks_are_those_of_all_distances(groups, block, monkeypatch):
    monkeypatch.setattr(losses, "_ROWS", block)
    points, labels = rows(groups, size=40)
    assert torch.equal(losses.medoids(points, labels, 6), plain_medoids(points, labels, 6))


def test_of_equal_members_the_earliest_is_the_medoid():
    points = F.normalize(torch.tensor([[[3.0, 1], [1, 3], [1, 0], [0, 1], [1, 1], [1, 1], [1, 1]]]), dim=2)
    labels = torch.tensor([[1, 1, 0, 0, 2, 2, 2]])
    assert losses.medoids(points, labels, 4).tolist() == [[2, 0, 4, -1]]


@pytest.mark.parametrize("kind", losses.PROTOTYPES)
def test_gradient_reaches_what_makes_a_prototype(kind):
    points, labels = rows(groups=1)
    points.requires_grad_()
    table, present = losses.prototypes(points, labels, 6, kind)
    assert present[0].tolist() == [*[True] * 5, False]
    assert table[0, 5].abs().sum() == 0
    table.sum().backward()
    reached = points.grad[0].abs().sum(1) > 0
    medoids = losses.medoids(points, labels, 6)[0, :5]
    assert reached.nonzero()[:, 0].tolist() == (sorted(medoids.tolist()) if kind == "medoid" else list(range(20)))


@pytest.mark.parametrize(("channels", "side"), [(30, 4), (5, 6)])
def test_patch_weights_are_the_means_of_normed_columns(channels, side):
    maps = torch.randn(2, channels, side, side + 1, generator=torch.Generator().manual_seed(0)) + 0.4
    flat = maps.flatten(2)
    wanted = F.normalize(flat.mT @ flat, dim=1).mean(2)
    torch.testing.assert_close(losses.patch_weights(maps), wanted)


def loss(points, others, labels, weights, **settings):
    return losses.object_loss(points, others, labels, weights, losses.prototypes(points, labels, 6), **settings)


def test_cross_entropies_are_weighted_means_over_the_ids_that_occur():
    points, labels = rows()
    others, weights = points.flip(1), torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    found = loss(points, others, labels, weights, across=0.3)
    entropies = []
    for seen in (points, others):
        own = []
        for group, names in enumerate(labels):
            known, targets = names.unique(return_inverse=True)
            centres = losses.prototypes(points[group][None], names[None], 6)[0][0][known]
            own.append(F.cross_entropy(seen[group] @ centres.T / 0.07, targets, reduction="none"))
        entropies.append((torch.stack(own) * weights).mean())
    torch.testing.assert_close(found.local, entropies[0])
    torch.testing.assert_close(found.across, entropies[1])
    torch.testing.assert_close(found.total, (0.7 * entropies[0] + 0.3 * entropies[1]) / 2)


def test_smoothed_targets_are_those_of_torch_but_for_the_own_share():
    """Torch spreads the share over all ids, the own one too."""
    points, labels = rows(groups=1)
    weights = torch.rand(1, 20, generator=torch.Generator().manual_seed(1))
    found = loss(points, points, labels, weights, smoothing=0.1)
    centres = losses.prototypes(points, labels, 6)[0][0, :5]
    share = 0.1 * 5 / 4
    entropy = F.cross_entropy(points[0] @ centres.T / 0.07, labels[0], label_smoothing=share)
    torch.testing.assert_close(found.local, entropy * weights.mean())
    assert torch.equal(loss(points, points, labels, weights.flip(1), smoothing=0.1).local, found.local)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_object_gives_nothing_to_learn(smoothing):
    points, _ = rows()
    points.requires_grad_()
    labels = torch.full((3, 20), 2)
    found = loss(points, points.flip(1), labels, torch.ones(3, 20), smoothing=smoothing)
    found.total.backward()
    assert found.total == 0
    assert points.grad.abs().max() == 0


def test_pictures_in_another_order_change_nothing():
    points, labels = rows()
    weights = torch.rand(3, 20, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([2, 0, 1])
    for scope in (lambda part: part, lambda part: part.flatten(0, 1)[None]):
        one, two = (
            loss(*(scope(part) for part in (points[at], points[at].flip(1), labels[at], weights[at])))
            for at in (slice(None), order)
        )
        torch.testing.assert_close(one.total, two.total)


def test_the_share_of_the_object_loss_is_a_step():
    shares = [losses.object_share(step, 2, 0.9) for step in range(5)]
    assert shares == [0, 0, 0, 0.9, 0.9]
    assert losses.object_share(9, 2, 1.5) == 1
