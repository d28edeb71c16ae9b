"""Clustering transformers and both levels: what padding, order and nesting must keep."""

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from models.clustering import ClusteringTransformer, NodeNorm
from models.hierarchy import HierarchicalGrouping, PositionTables, compose, group_means, nested_labels


def nodes(pictures=3, count=9, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = nn.functional.normalize(torch.randn(pictures, count, dim, generator=generator), dim=2)
    positions = torch.rand(pictures, count, dim, generator=generator)
    padding = torch.arange(count) >= torch.tensor([[count], [count - 4], [count - 2]])
    return rows.masked_fill(padding[:, :, None], 0.0), padding, positions.masked_fill(padding[:, :, None], 0.0)


def transformer(**settings):
    torch.manual_seed(0)
    return ClusteringTransformer(8, heads=2, layers=2, hidden=16, dropout=0.0, **settings)


def test_the_summary_of_the_nodes_keeps_its_width():
    """2d -> 2d -> d (twke18/HSG), whatever the feed-forward parts have."""
    model = ClusteringTransformer(8, heads=2, hidden=24)
    assert model.summary.weight.shape == (16, 16)
    assert model.target.weight.shape == (8, 16)


@pytest.mark.parametrize("shape", [(5, 3, 4), (6, 4)])
def test_node_norm_is_torchs_batch_norm(shape):
    ours, theirs = NodeNorm(4), nn.BatchNorm1d(4)
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3 + 1
    for training in (True, False):
        ours.train(training), theirs.train(training)
        torch.testing.assert_close(ours(rows), theirs(rows.flatten(0, -2)).view_as(rows))
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_node_norm_counts_valid_rows_alone():
    rows = torch.randn(6, 2, 4, generator=torch.Generator().manual_seed(0))
    padding = torch.arange(6)[:, None] >= torch.tensor([6, 2])
    masked, plain = NodeNorm(4), nn.BatchNorm1d(4)
    leaf, other = (rows.clone().requires_grad_() for _ in range(2))
    found, wanted = masked(leaf, padding)[~padding], plain(other[~padding])
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(masked.running_var, plain.running_var)
    (found**3).sum().backward(), (wanted**3).sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("training", [True, False])
def test_more_padding_changes_nothing_unless_faithful(training):
    rows, padding, positions = nodes()
    queries = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))

    def run(faithful, more):
        wide = [nn.functional.pad(part, (0, 0, 0, more)) for part in (rows, positions)]
        hidden = nn.functional.pad(padding, (0, more), value=True)
        model = transformer(faithful=faithful).train(training)
        centroids, features, logits, _ = model(wide[0], hidden, queries, wide[1])
        return torch.cat([centroids, features, logits[:, :, :9].masked_fill(padding[:, None], 0.0)], dim=2)

    torch.testing.assert_close(run(False, 0), run(False, 7), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(run(True, 0), run(True, 7), atol=1e-2)


def test_groups_come_by_descending_largest_logit_and_gradient_reaches_the_nodes():
    rows, padding, positions = nodes()
    rows.requires_grad_()
    model = transformer()
    queries = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    centroids, features, logits, memory = model(rows, padding, queries, positions)
    best = logits.masked_fill(padding[:, None], -torch.inf).amax(2)
    assert (best[:, :-1] >= best[:, 1:]).all()
    torch.testing.assert_close(logits, centroids @ memory.mT / 8**0.5)
    (features.sum() + logits.square().sum()).backward()
    assert rows.grad.isfinite().all()
    assert (rows.grad[~padding] != 0).any(1).all()


def test_a_single_picture_cannot_train_but_be_grouped():
    rows, padding, positions = (part[1:2] for part in nodes())
    model, queries = transformer(), torch.randn(3, 8)
    with pytest.raises(ConfigError) as error:
        model(rows, padding, queries, positions)
    assert str(error.value) == ("data.batch_size=1: the clustering transformer normalises over pictures; use 2 or more")
    assert model.eval()(rows, padding, queries, positions)[2].isfinite().all()


def test_both_levels_are_trained_and_nested():
    rows, padding, positions = nodes()
    torch.manual_seed(0)
    model = HierarchicalGrouping(8, (5, 3), heads=2, layers=1, hidden=16, dropout=0.0)
    found = model(rows, padding, positions)
    assert (found.fine.shape, found.coarse.shape, found.transition.shape) == ((3, 5, 9), (3, 3, 9), (3, 3, 5))
    torch.testing.assert_close(found.coarse, found.transition @ found.fine)
    torch.testing.assert_close(found.coarse.sum(1), torch.ones(3, 9))
    fine, coarse = found.nested
    for picture in range(3):
        for group in fine[picture].unique():
            assert len(coarse[picture][fine[picture] == group].unique()) == 1
    (found.coarse[:, 0].sum() + found.coarse_centroids.square().sum()).backward()
    assert all(weight.grad is not None for weight in model.parameters())


def test_compose_and_nesting_by_hand():
    fine, transition, coarse = compose(
        torch.tensor([[[9.0, 0.0], [0.0, 9.0]]]), torch.tensor([[[0.0, 9.0], [9.0, 0.0]]])
    )
    assert fine.argmax(1).tolist() == [[0, 1]]
    assert coarse.argmax(1).tolist() == [[1, 0]]
    assert nested_labels(torch.tensor([[[0, 1], [-1, 0]]]), transition).tolist() == [[[1, 0], [-1, 1]]]


def test_group_means_leave_padding_out_and_empty_groups_zero():
    rows = torch.arange(12.0).view(1, 4, 3)
    labels, padding = torch.tensor([[0, 2, 0, 0]]), torch.tensor([[False, False, False, True]])
    means = group_means(rows, labels, padding, 3)
    assert means.tolist() == [[[3, 4, 5], [0, 0, 0], [3, 4, 5]]]
    unit = group_means(rows, labels, padding, 3, normalise=True)
    torch.testing.assert_close(unit.norm(dim=2), torch.tensor([[1.0, 0.0, 1.0]]))


def test_position_tables_hold_columns_first_and_stretch_beyond_their_length():
    tables = PositionTables(6, length=5)
    grid = tables((3, 4))
    assert torch.equal(grid[2, 3], torch.cat([tables.columns[3], tables.rows[2]]))
    wide = tables((2, 9))
    torch.testing.assert_close(wide[0, ::2, :3], tables.columns)
    torch.testing.assert_close(wide[0, 1, :3], (tables.columns[0] + tables.columns[1]) / 2)
