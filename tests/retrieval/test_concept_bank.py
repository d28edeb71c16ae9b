"""The bank of each concept keeps its newest rows, half of what comes, and nothing of a concept seen once."""

import pytest
import torch

from retrieval.concept_bank import ConceptBank


def put(bank, concepts, first, order=None):
    """Rows that say when they came; a permutation that leaves them as they are."""
    concepts = torch.tensor(concepts)
    rows = torch.arange(first, first + len(concepts)).float()[:, None].expand(-1, bank.storage.shape[2])
    bank.enqueue(concepts, rows, torch.arange(len(concepts)) if order is None else torch.tensor(order))


def held(bank):
    rows, of = bank.rows()
    return list(zip(of.tolist(), rows[:, 0].int().tolist(), strict=True))


def test_half_of_the_rows_of_a_concept_come_in_and_one_alone_does_not():
    bank = ConceptBank(3, 4, 2)
    put(bank, [0, 2, 0, 0, 1, 0, 2], 10)
    assert held(bank) == [(0, 10), (0, 12), (2, 11)]
    assert bank.counts.tolist() == [2, 0, 1]


def test_the_order_says_which_half():
    bank = ConceptBank(2, 4, 2)
    put(bank, [0, 1, 0, 0, 0, 1], 0, order=[4, 5, 2, 1, 0, 3])
    assert held(bank) == [(0, 4), (0, 2), (1, 5)]


def test_the_newest_stay_where_there_is_no_room():
    bank = ConceptBank(2, 3, 2)
    put(bank, [0] * 4, 0)
    put(bank, [0] * 4 + [1, 1], 10)
    assert held(bank) == [(0, 1), (0, 10), (0, 11), (1, 14)]
    put(bank, [0] * 10, 20)  # more than there is room for: the last of the half that comes in
    assert held(bank) == [(0, 22), (0, 23), (0, 24), (1, 14)]
    assert bank.counts.tolist() == [3, 1]


def test_it_is_whole_in_its_state():
    bank, other = ConceptBank(2, 3, 2), ConceptBank(2, 3, 2)
    put(bank, [0] * 8 + [1, 1], 0)
    other.load_state_dict(bank.state_dict())
    for one in (bank, other):
        put(one, [0, 0, 1, 1], 50)
    assert held(other) == held(bank) == [(0, 2), (0, 3), (0, 50), (1, 8), (1, 52)]


def test_an_empty_bank_gives_nothing():
    rows, of = ConceptBank(2, 3, 5).rows()
    assert rows.shape == (0, 5)
    assert len(of) == 0
    with pytest.raises(ValueError, match="a bank needs at least one of each"):
        ConceptBank(2, 0, 5)
