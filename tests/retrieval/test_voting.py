"""Labels by retrieval."""

import torch

from retrieval.voting import agreement, nearest_labels, vote


def test_the_nearest_labels_vote_and_equals_go_to_the_smallest():
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([4, 2, 0, 2])
    found = nearest_labels(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), bank, labels, 3)
    assert found.tolist() == [[4, 2, 0], [0, 2, 4]]
    assert vote(found, 5).tolist() == [0, 0]
    assert vote(torch.tensor([[4, 2, 2], [4, 4, 1]]), 5).tolist() == [2, 4]
    assert nearest_labels(bank, bank, labels, 20).shape == (4, 4)
    torch.testing.assert_close(agreement(found, torch.tensor([2, 3])), torch.tensor(1 / 6))
