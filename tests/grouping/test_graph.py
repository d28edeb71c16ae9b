"""The graph of segments against loops over its rows."""

import pytest
import torch
import torch.nn.functional as F

from grouping.graph import knn_graph


def loop_graph(nodes, padding, knn, views):
    graphs = []
    for x, gone, view in zip(nodes, padding, views, strict=True):
        valid = [i for i in range(len(x)) if not gone[i]]
        graph = torch.zeros(len(x), len(x))
        for i in valid:
            row = {j: float((5 * x[i] @ x[j]).exp()) if i != j or len(valid) == 1 else 0.0 for j in valid}
            for label in {int(view[j]) for j in valid}:
                group = {j: row[j] for j in valid if int(view[j]) == label}
                limit = sorted(group.values(), reverse=True)[min(knn or len(group), len(group)) - 1]
                for j, value in group.items():
                    graph[i, j] = value if value >= limit else 0.0
        graphs.append(graph)
    return torch.stack(graphs)


@pytest.mark.parametrize("knn", [1, 2, 4, 50, None])
@pytest.mark.parametrize("per_view", [True, False])
def test_equals_loops_over_rows(knn, per_view):
    generator = torch.Generator().manual_seed(0)
    nodes = F.normalize(torch.randn(3, 9, 4, generator=generator), dim=2)
    padding = torch.rand(3, 9, generator=generator) < 0.3
    padding[1], padding[2] = True, torch.arange(9) > 0  # no node, one node
    nodes = nodes.masked_fill(padding[:, :, None], 0.0)
    views = torch.randint(2, (3, 9), generator=generator)
    wanted = loop_graph(nodes, padding, knn, views if per_view else torch.zeros_like(views))
    settings = (nodes, padding, knn, views if per_view else None, 2)
    torch.testing.assert_close(knn_graph(*settings, binary=False), wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(knn_graph(*settings), (wanted > 0).float())
    assert knn_graph(*settings)[1].sum() == 0
    assert knn_graph(*settings)[2].sum() == 1
