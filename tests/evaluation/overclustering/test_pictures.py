"""What is kept of a picture: its places, its patches without padding, and a keyed share of its points."""

import torch

from evaluation.overclustering import pictures
from evaluation.overclustering.pictures import Picture
from retrieval.whitening import Reduction

SAME = Reduction(torch.zeros(2), torch.ones(2), torch.eye(2))


def batch():
    """Two pictures of 8 x 8 with 4 x 4 patches of 2 px; the second is 5 x 6 and padded."""
    valid = torch.zeros(2, 8, 8, dtype=torch.bool)
    valid[0], valid[1, :5, :6] = True, True
    label = torch.arange(64).view(1, 8, 8).repeat(2, 1, 1)
    return {"image": torch.zeros(2, 3, 8, 8), "valid": valid, "label": label, "index": torch.tensor([7, 3])}


def codes():
    return torch.arange(32.0).view(1, 2, 4, 4).repeat(2, 1, 1, 1)


def test_labels_and_patches_at_every_pixel():
    whole, padded = pictures.taken(batch(), codes(), SAME, None, labelled=True)
    assert (whole.index, whole.size, padded.index, padded.size) == (7, (4, 4), 3, (3, 3))
    assert torch.equal(whole.label, torch.arange(64).view(8, 8).byte())
    assert torch.equal(whole.points, codes()[0].flatten(1).T)
    ids = whole.at_places(torch.arange(16))
    assert torch.equal(ids, torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1))
    assert padded.label.shape == (5, 6)
    assert torch.equal(padded.at_places(torch.arange(9))[4], torch.tensor([6, 6, 7, 7, 8, 8]))
    assert torch.equal(padded.points, codes()[0, :, :3, :3].flatten(1).T)


def test_places_of_a_grid_are_those_of_torch():
    whole = pictures.taken(batch(), codes(), SAME, 3, labelled=True)[0]
    nearest = torch.nn.functional.interpolate(batch()["label"][:1, None].float(), size=(3, 3), mode="nearest")
    assert torch.equal(whole.label, nearest[0, 0].byte())


def test_labels_are_not_kept_where_nothing_may_read_them():
    assert all(item.label is None for item in pictures.taken(batch(), codes(), SAME, 3, labelled=False))


def test_masks_are_kept_at_the_places():
    mask = torch.zeros(2, 2, 2, dtype=torch.bool)
    mask[:, 1, 0] = True
    found = pictures.masked(batch(), mask, None)
    assert found[7].nonzero().tolist() == [[row, column] for row in range(4, 8) for column in range(4)]
    assert found[3].nonzero().tolist() == [[4, column] for column in range(4)]
    kept = pictures.taken(batch(), codes(), SAME, None, labelled=False, masks=found)
    assert [torch.equal(item.mask, found[item.index]) for item in kept] == [True, True]


def test_a_sample_takes_as_many_of_every_picture_and_the_same_ones_again():
    empty = torch.zeros(0, dtype=torch.int64)
    every = [Picture(n, torch.full((10, 1), float(n)) + torch.arange(10)[:, None] / 100, (1, 10), empty, empty)
             for n in range(4)]  # fmt: skip
    found = pictures.sample(every, 12, seed=0)
    assert found.floor().flatten().tolist() == [0.0] * 3 + [1.0] * 3 + [2.0] * 3 + [3.0] * 3
    assert torch.equal(found, pictures.sample(every, 12, seed=0))
    assert not torch.equal(found, pictures.sample(every, 12, seed=1))
    assert len(pictures.sample(every, None, seed=0)) == len(pictures.sample(every, 400, seed=0)) == 40
