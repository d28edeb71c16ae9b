"""Criteria of grouping: against their definitions, and where the right number of groups is known."""

import math

import pytest
import torch
from torch.nn import functional as F

from evaluation import criteria
from retrieval import kmeans


@pytest.fixture(scope="module")
def bundles() -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors in four narrow bundles."""
    draw = torch.Generator().manual_seed(3)
    centres = torch.eye(4).repeat_interleave(60, 0)
    points = F.normalize(centres + 0.15 * torch.randn(240, 4, generator=draw), dim=1)
    order = torch.randperm(240, generator=draw)
    return points[order], torch.arange(4).repeat_interleave(60)[order]


def test_silhouette_by_its_definition(bundles):
    points, ids = bundles[0][:30], bundles[1][:30]
    distance = (1 - points.double() @ points.double().T).clamp(min=0)
    scores = []
    for i in range(30):
        own = [j for j in range(30) if ids[j] == ids[i] and j != i]
        a = sum(float(distance[i, j]) for j in own) / len(own)
        b = min(float(distance[i, ids == other].mean()) for other in ids.unique() if other != ids[i])
        scores.append((b - a) / max(a, b))
    assert criteria.silhouette(points, ids) == pytest.approx(sum(scores) / 30, abs=1e-6)


def test_a_point_alone_counts_zero_and_one_group_has_no_score(bundles):
    points = bundles[0][:3]
    assert criteria.silhouette(points, torch.arange(3)) == 0
    assert math.isnan(criteria.silhouette(points, torch.zeros(3, dtype=torch.int64)))
    assert math.isnan(criteria.davies_bouldin(points, torch.zeros(3, dtype=torch.int64)))


def test_the_true_number_of_groups_is_the_best_by_every_criterion(bundles):
    points, _ = bundles
    found = {}
    for k in range(2, 8):
        ids = kmeans.assign(points, kmeans.fit(points, k, seed=1, restarts=3).centroids)
        found[k] = criteria.silhouette(points, ids), -criteria.davies_bouldin(points, ids)
    assert max(found, key=lambda k: found[k][0]) == 4
    assert max(found, key=lambda k: found[k][1]) == 4
    assert criteria.stability(points, 4, seed=0, iterations=20) == pytest.approx(1.0)
    assert criteria.stability(points, 7, seed=0, iterations=20) < 0.95
