"""Goodness of grouping: values derived by hand, gradients, and what padding may not change."""

import pytest
import torch
import torch.nn.functional as F

from losses.grouping import centroid_contrast, collapse, modularity


def cliques(groups, size):
    """A graph of `groups` complete groups of `size` nodes, [1,M,M], without loops."""
    block = torch.ones(size, size, dtype=torch.float64) - torch.eye(size, dtype=torch.float64)
    return torch.block_diag(*[block] * groups)[None]


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_known_values(groups):
    graph, nodes = cliques(groups, 5), groups * 5
    padding = torch.zeros(1, nodes, dtype=torch.bool)
    pure = F.one_hot(torch.arange(groups).repeat_interleave(5), groups).T[None].double()
    one = torch.zeros_like(pure)
    one[:, 0] = 1
    uniform = torch.full_like(pure, 1 / groups)
    found = [float(modularity(memberships, graph, padding)) for memberships in (pure, one, uniform)]
    assert found == pytest.approx([0.5 + 1 / (4 * groups), 0.75, 1 - 1 / (4 * groups)])
    assert float(collapse(pure, padding)) == pytest.approx(1.0)
    assert float(collapse(one, padding)) == pytest.approx(groups**0.5)


def scene(slots):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 6, generator=generator, dtype=torch.float64)
    graph = (torch.rand(3, 6, 6, generator=generator) < 0.5).double()
    more = slots - 6
    padding = torch.zeros(3, slots, dtype=torch.bool)
    padding[:, 6:] = True
    return F.pad(logits, (0, more)).softmax(1), F.pad(graph, (0, more, 0, more)), padding


def test_padding_changes_nothing_but_the_released_collapse():
    small, large = scene(6), scene(11)
    torch.testing.assert_close(modularity(*small), modularity(*large))
    torch.testing.assert_close(collapse(*small[::2]), collapse(*large[::2]))
    torch.testing.assert_close(collapse(*small[::2]), collapse(*large[::2], slots=True) * 11 / 6)


def test_gradients_and_a_picture_without_nodes():
    memberships, graph, padding = scene(6)
    assert torch.autograd.gradcheck(lambda p: modularity(p, graph, padding), memberships.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda p: collapse(p, padding), memberships.clone().requires_grad_())
    empty = padding.clone()
    empty[2] = True
    leaf = memberships.clone().requires_grad_()
    loss = modularity(leaf, graph * ~empty[:, :, None] * ~empty[:, None], empty) + collapse(leaf, empty)
    loss.backward()
    wanted = modularity(memberships[:2], graph[:2], padding[:2]) + collapse(memberships[:2], padding[:2])
    torch.testing.assert_close(loss.detach(), wanted)
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[2] == 0).all()


def test_centroid_contrast_is_a_softmax_over_all_centroids():
    centroids = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def dense(rows):
        unit = F.normalize(rows, dim=1)
        return F.cross_entropy(16 * unit @ unit.T, torch.arange(7))

    sides = [centroids.clone().requires_grad_() for _ in range(2)]
    losses = dense(sides[0]), centroid_contrast(sides[1], 16.0)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(sides[0].grad, sides[1].grad)
    halves = [centroid_contrast(centroids[a:b], 16.0, centroids, a) * (b - a) for a, b in ((0, 3), (3, 7))]
    torch.testing.assert_close(sum(halves) / 7, losses[0].detach())
