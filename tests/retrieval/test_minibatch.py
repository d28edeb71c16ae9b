"""Mini-batch k-means against the same written out; groups, left-overs, short passes and two ranks."""

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError
from retrieval.minibatch import Clusters, MiniBatchKMeans
from tests.support.ranks import on_two_ranks

SETTINGS = {"iterations": 10, "init": "k-means++", "seed": 3}


def batches(count: int, rows: int = 60) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(5, 8, generator=draw), dim=1)
    return [
        F.normalize(
            centres[torch.randint(5, (rows,), generator=draw)] + 0.2 * torch.randn(rows, 8, generator=draw), dim=1
        )
        for _ in range(count)
    ]


def passed(parts: list[torch.Tensor], **settings) -> Clusters:
    made = MiniBatchKMeans(5, **{"first": 2, "group": 1, **SETTINGS, **settings})
    for part in parts:
        made.add(part)
    return made.finish()


@pytest.mark.parametrize("group", [1, 2])
def test_later_groups_move_the_centroids_by_their_share(group):
    parts = batches(7)
    found = passed(parts, group=group)
    start = torch.cat(parts[:2])
    centroids = found.fitted.double()
    gaps, ids = torch.cdist(start.double(), centroids).square().min(1)
    counts, distances = torch.bincount(ids, minlength=5).double(), [gaps.mean()]
    for first in range(2, 7 - (7 - 2) % group, group):
        points = torch.cat(parts[first : first + group]).double()
        gaps, ids = torch.cdist(points, centroids).square().min(1)
        distances.append(gaps.mean())
        moved = centroids.clone()
        for k in ids.unique():
            own = points[ids == k]
            counts[k] += len(own)
            moved[k] += len(own) / counts[k] * (own.mean(0) - centroids[k])
        centroids = moved
    assert torch.allclose(found.centroids.double(), centroids, atol=1e-5)
    assert torch.equal(found.counts, counts)
    assert found.distance == pytest.approx(float(sum(distances) / len(distances)), rel=1e-4)


def test_left_over_batches_move_nothing():
    parts = batches(7)
    assert torch.equal(passed(parts, group=2).centroids, passed(parts[:6], group=2).centroids)
    assert not torch.equal(passed(parts, group=1).centroids, passed(parts[:6], group=1).centroids)


def test_a_pass_that_is_shorter_than_the_first_fit_is_fitted_at_its_end():
    parts = batches(3)
    short, whole = passed(parts, first=20), passed(parts, first=3)
    assert torch.equal(short.centroids, whole.centroids)
    assert torch.equal(short.centroids, short.fitted)
    with pytest.raises(ConfigError, match="5 clusters from 3 points"):
        passed([parts[0][:3]], first=20)


def _on_rank(rank: int) -> Clusters:
    return passed([part.tensor_split([25])[rank] for part in batches(6)])


@pytest.mark.ddp
def test_two_ranks_with_uneven_parts_are_one_process():
    one = passed(batches(6))
    for found in on_two_ranks(_on_rank):
        assert torch.allclose(found.centroids, one.centroids, atol=1e-6)
        assert torch.equal(found.counts, one.counts)
        assert found.distance == pytest.approx(one.distance, rel=1e-5)
