"""Labels, weights and losses of clustered cells; PiCIE's own numbers are replayed in tests/reference."""

import pytest
import torch
import torch.nn.functional as F

from losses import clusters
from tests.support.ranks import on_two_ranks


def codes(count: int = 4, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, 6, 5, 4, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_a_cell_belongs_to_the_nearest_centroid_whatever_its_length():
    maps, centroids = codes(), 0.3 * torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    rows = maps.permute(0, 2, 3, 1).reshape(-1, 6)
    gaps = torch.cdist(rows, centroids).square()
    assert torch.equal(clusters.nearest_centroids(maps, centroids).flatten(), gaps.argmin(1))
    scores = clusters.similarities(maps, centroids).permute(0, 2, 3, 1).reshape(-1, 7)
    assert torch.allclose(scores, -gaps, atol=1e-5)


def test_weights_of_large_and_of_empty_clusters():
    counts = torch.tensor([60, 30, 10, 0])
    assert clusters.class_weights(counts, "proportional").tolist() == pytest.approx([0.6, 0.3, 0.1, 0])
    assert clusters.class_weights(counts, "none").tolist() == [1, 1, 1, 1]
    inverse = clusters.class_weights(counts, "inverse")
    assert (inverse[:3] * counts[:3]).tolist() == pytest.approx([100 / 3] * 3)  # every filled cluster weighs alike
    assert inverse[3] == 0


def test_the_cross_entropy_is_a_weighted_mean_and_zero_without_weights():
    logits, labels = torch.randn(2, 5, 3, 3), torch.randint(5, (2, 3, 3))
    weight = torch.rand(5)
    found = clusters.weighted_cross_entropy(logits, labels, weight)
    assert torch.allclose(found, F.cross_entropy(logits, labels, weight))
    assert clusters.weighted_cross_entropy(logits, labels, torch.zeros(5)) == 0


def test_terms_across_views_have_the_clusters_of_the_other():
    maps = [codes(seed=1), codes(seed=2)]
    draw = torch.Generator().manual_seed(3)
    targets = []
    for own in maps:
        centroids = torch.randn(3, 6, generator=draw)
        labels = clusters.nearest_centroids(own, centroids)
        targets.append(clusters.Targets(centroids, labels, torch.rand(3, generator=draw)))
    found = clusters.cross_views(maps, targets)
    for i, own in enumerate(maps):
        for j, other in enumerate(targets):
            logits = torch.einsum("bdhw,kd->bkhw", own, other.centroids)
            assert torch.allclose(found.terms[i][j], F.cross_entropy(logits, other.labels, other.weight), atol=1e-6)
    assert torch.allclose(found.total, sum(sum(row) for row in found.terms) / 4)


def test_heads_weigh_as_the_paper_has_it():
    assert clusters.head_weights([27, 100]) == pytest.approx([0.583, 0.417], abs=1e-3)
    assert clusters.head_weights([27]) == [1.0]
    assert sum(clusters.head_weights([5, 10, 100])) == pytest.approx(1)


def test_sampled_cells_are_even_over_the_clusters_that_occur():
    labels = torch.zeros(2, 20, 20, dtype=torch.int64)
    labels[0, 0, :3] = 1  # 3 cells, with replacement
    labels[1, 5:15] = 4
    rows = clusters.sampled_evenly(labels, torch.Generator().manual_seed(0))
    assert rows.shape == (800,)
    drawn = torch.bincount(labels.flatten()[rows], minlength=5)
    assert drawn[[2, 3]].sum() == 0
    assert drawn[[0, 1, 4]].tolist() == pytest.approx([800 / 3] * 3, abs=2)
    assert len(rows[labels.flatten()[rows] == 0].unique()) == drawn[0]  # many enough: each once
    again = clusters.sampled_evenly(labels, torch.Generator().manual_seed(0))
    assert torch.equal(rows, again)


def _on_rank(rank: int) -> tuple[float, list[float]]:
    part = slice(2 * rank, 2 * rank + 2)
    maps = codes().requires_grad_()
    labels, weight = torch.arange(80).reshape(4, 5, 4) % 6, torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    labels[:2] = 0
    loss = clusters.weighted_cross_entropy(maps[part], labels[part], weight)
    loss.backward()
    return float(loss), maps.grad[part].flatten().tolist()


@pytest.mark.ddp
def test_the_mean_of_two_ranks_is_the_loss_of_one_process():
    """Though the weights of the cells of one are larger than those of the other."""
    (one, first), (two, second) = on_two_ranks(_on_rank)
    maps = codes().requires_grad_()
    labels, weight = torch.arange(80).reshape(4, 5, 4) % 6, torch.tensor([0.5, 0.1, 0.1, 0.1, 0.1, 0.1])
    labels[:2] = 0
    loss = clusters.weighted_cross_entropy(maps, labels, weight)
    loss.backward()
    assert (one + two) / 2 == pytest.approx(float(loss), rel=1e-5)
    assert torch.allclose(torch.tensor(first + second) / 2, maps.grad.flatten(), atol=1e-6)
