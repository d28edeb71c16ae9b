"""Which boxes are drawn belongs to the picture and the step, not to the batch."""

import torch

from models.detection.draws import KeyedSampler

LABELS = [torch.tensor([1] * 30 + [0] * 60 + [-1] * 10), torch.tensor([0] * 50 + [2] * 2)]


def drawn(labels, keys, count=16, positive=0.25, purpose="boxes"):
    sampler = KeyedSampler(count, positive, purpose)
    sampler.keys = keys
    return sampler(labels)


def test_counts_and_kinds():
    positive, negative = drawn(LABELS, [(0, 3, 7), (0, 3, 8)])
    assert [int(mask.sum()) for mask in positive] == [4, 2]
    assert [int(mask.sum()) for mask in negative] == [12, 14]
    for yes, no, labels in zip(positive, negative, LABELS, strict=True):
        assert (labels[yes] >= 1).all()
        assert (labels[no] == 0).all()


def test_a_picture_draws_the_same_in_any_batch():
    together = drawn(LABELS, [(0, 3, 7), (0, 3, 8)])
    alone = drawn(LABELS[1:], [(0, 3, 8)])
    assert torch.equal(together[0][1], alone[0][0])
    assert torch.equal(together[1][1], alone[1][0])


def test_steps_pictures_seeds_and_purposes_differ():
    first = drawn(LABELS[:1], [(0, 3, 7)])[1][0]
    others = [drawn(LABELS[:1], [key])[1][0] for key in ((0, 4, 7), (0, 3, 8), (1, 3, 7))]
    others.append(drawn(LABELS[:1], [(0, 3, 7)], purpose="anchors")[1][0])
    assert not any(torch.equal(first, other) for other in others)
