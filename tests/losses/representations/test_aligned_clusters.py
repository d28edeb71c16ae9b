"""Clusters of aligned crops: a cell by hand, what counts, gradients, pairs without a cell, several ranks."""

import pytest
import torch

from losses.representations import aligned_clusters as losses
from tests.support.ranks import on_two_ranks


def drawn(batch: int = 4, views: int = 3, count: int = 5, side: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shape = batch, views, count, side, side
    return torch.rand(shape, generator=draw).softmax(2), torch.randn(shape, generator=draw)


def test_a_term_is_the_cross_entropy_of_the_cells_that_count():
    targets, logits = drawn()
    kept = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    kept[1, 0, 0, 1] = kept[2, 0, 1, 1] = kept[3, 1, 0, 0] = True
    terms, counts = losses.pair_terms(targets, logits, 0.1, kept)
    assert counts.tolist() == [2, 1, 0]

    def cell(b, v, y, x):
        return -(targets[b, v, :, y, x] * (logits[b, v, :, y, x] / 0.1).log_softmax(0)).sum()

    wanted = torch.stack([(cell(1, 0, 0, 1) + cell(2, 0, 1, 1)) / 2, cell(3, 1, 0, 0), torch.tensor(0.0)])
    assert torch.allclose(terms, wanted, rtol=1e-5)
    whole, all_cells = losses.pair_terms(targets, logits, 0.1)
    assert torch.allclose(whole, losses.pair_terms(targets, logits, 0.1, torch.ones_like(kept))[0])
    assert all_cells.tolist() == [16, 16, 16]


def test_logits_alone_get_gradients_and_large_ones_stay_finite():
    targets, logits = drawn()
    targets.requires_grad_()
    logits = (100 * logits).requires_grad_()
    losses.pair_terms(targets, logits, 0.01)[0].sum().backward()
    assert targets.grad is None
    assert logits.grad.isfinite().all()
    assert logits.grad.any()


def test_pairs_without_a_cell_are_left_out_or_count_as_nothing():
    terms, counts = torch.tensor([2.0, 0.0, 4.0]), torch.tensor([5.0, 0.0, 1.0])
    assert float(losses.mean_of_pairs(terms, counts)) == 3
    assert float(losses.mean_of_pairs(terms, counts, "count")) == 2
    assert float(losses.mean_of_pairs(terms * 0, counts * 0)) == 0


def test_a_cell_is_inside_where_all_of_it_is_but_for_rounding():
    masks = torch.tensor([1.0, 1.0 - 6e-8, 0.999]).reshape(1, 1, 1, 1, 3)
    assert losses.inside(masks).flatten().tolist() == [True, True, False]
    assert losses.inside(masks, 0.0).flatten().tolist() == [True, False, False]


def _half(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    targets, logits = (part.chunk(2)[rank] for part in drawn())
    kept = (drawn()[1][:, :, 0] > 0).chunk(2)[rank]
    return losses.pair_terms(targets, logits, 0.1, kept)


@pytest.mark.ddp
def test_the_mean_over_ranks_is_that_of_the_whole_batch():
    targets, logits = drawn()
    terms, counts = losses.pair_terms(targets, logits, 0.1, logits[:, :, 0] > 0)
    parts = on_two_ranks(_half)
    assert torch.allclose(torch.stack([part[0] for part in parts]).mean(0), terms, rtol=1e-5)
    assert all(torch.equal(part[1], counts) for part in parts)
