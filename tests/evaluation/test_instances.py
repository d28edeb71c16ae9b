"""Average precision of instances: by hand, against another library that counts, groups, nothing there."""

import pytest
import torch

from evaluation.instances import Detections, InstanceScore, boxes_of
from tests.support.ranks import on_two_ranks

KEYS = {f"{kind}_{cut}" for kind in ("box", "mask") for cut in ("AP", "AP50", "AP75")}


def squares(*corners, side=20, size=8):
    masks = torch.zeros(len(corners), side, side, dtype=torch.bool)
    for mask, (top, left) in zip(masks, corners, strict=True):
        mask[top : top + size, left : left + size] = True
    return masks


def detections(masks, scores):
    return Detections(masks, boxes_of(masks), torch.tensor(scores, dtype=torch.float32))


def nobody(count):
    return torch.zeros(count, dtype=torch.bool)


def random_pictures(number, seed=0):
    """Squares, and squares near them that stand for what a method found."""
    draws = torch.Generator().manual_seed(seed)
    for _ in range(number):
        places = torch.randint(0, 12, (4, 2), generator=draws)
        moved = (places + torch.randint(-2, 3, (4, 2), generator=draws)).clamp(0, 12)
        masks = squares(*moved.tolist())
        yield Detections(masks, boxes_of(masks), torch.rand(4, generator=draws)), squares(*places.tolist())


def test_boxes_are_tight_and_those_of_nothing_are_zero():
    masks = torch.cat([squares((3, 5)), torch.zeros(1, 20, 20, dtype=torch.bool)])
    assert boxes_of(masks).tolist() == [[5, 3, 13, 11], [0, 0, 0, 0]]
    assert boxes_of(masks[:0]).shape == (0, 4)


def test_perfect_objects_score_a_hundred(recwarn):
    score = InstanceScore()
    masks = squares((0, 0), (10, 10))
    score.update(detections(masks, [0.3, 0.9]), masks, nobody(2))
    assert score.compute() == pytest.approx(dict.fromkeys(KEYS, 100.0))
    assert not [one for one in recwarn if "compute" in str(one.message)]


def test_a_shifted_object_counts_at_the_bounds_that_it_meets():
    score = InstanceScore()
    score.update(detections(squares((0, 1)), [1.0]), squares((0, 0)), nobody(1))  # 7 of 9 columns are common
    found = score.compute()
    assert found["mask_AP50"] == found["mask_AP75"] == pytest.approx(100)
    assert found["box_AP"] == pytest.approx(60)  # 0.5 to 0.75, six of ten bounds
    other = InstanceScore()
    other.update(detections(squares((0, 2), size=9), [1.0]), squares((0, 0), size=9), nobody(1))  # 7 of 11
    assert other.compute()["mask_AP75"] == 0


def test_what_is_found_twice_and_higher_costs_precision():
    right, wrong = squares((0, 0)), squares((10, 10))
    score = InstanceScore()
    score.update(detections(torch.cat([wrong, right]), [0.9, 0.5]), right, nobody(1))
    assert score.compute()["mask_AP"] == pytest.approx(50)


def test_another_library_counts_the_same():
    scores = [InstanceScore(), InstanceScore("faster_coco_eval")]
    for found, true in random_pictures(30):
        crowd = torch.tensor([False, False, False, True])
        for score in scores:
            score.update(found, true, crowd)
    ours, other = (score.compute() for score in scores)
    assert 1 < ours["mask_AP"] < 99
    assert ours == pytest.approx(other, abs=1e-9)


def test_pictures_without_a_note_of_objects_are_passed_over():
    class Method:
        def detections(self, images, valid):
            return [detections(squares((0, 0)), [1.0]) for _ in images]

    score = InstanceScore()
    images, valid = torch.zeros(2, 3, 20, 20), torch.ones(2, 20, 20, dtype=torch.bool)
    maps = score.see(Method(), {"image": images, "valid": valid}, images)
    assert torch.equal(maps["instances"][0], squares((0, 0))[0].long())
    assert score.compute() == {}
    batch = {"image": images, "valid": valid, "instances": [squares((0, 0)), None]}
    score.see(Method(), batch | {"instances.crowd": [nobody(1), None]}, images)
    assert score.compute()["box_AP"] == pytest.approx(100)
    score.reset()
    assert score.compute() == {}


def test_the_best_lies_on_top_in_a_map():
    found = detections(squares((0, 0), (4, 4)), [0.2, 0.8])
    ids = found.id_map()
    assert ids[5, 5] == 1
    assert ids[1, 1] == 2
    assert ids[19, 19] == 0


def worker(rank):
    score = InstanceScore()
    for found, true in list(random_pictures(7, seed=4))[rank::2]:  # four pictures and three
        score.update(found, true, nobody(4))
    return score.compute()


@pytest.mark.ddp
def test_two_processes_count_as_one():
    score = InstanceScore()
    for found, true in random_pictures(7, seed=4):
        score.update(found, true, nobody(4))
    one = score.compute()
    for two in on_two_ranks(worker):
        assert two == one
