"""The foreground read-out by hand-made cases."""

import math

import pytest
import torch

from common.spec import ClassMeta
from evaluation.foreground import ForegroundScore, object_classes, overlap


def picture(*areas: tuple[int, slice, slice]) -> torch.Tensor:
    label = torch.zeros(20, 20, dtype=torch.int64)
    for value, rows, columns in areas:
        label[rows, columns] = value
    return label


def mask(rows: slice, columns: slice) -> torch.Tensor:
    return picture((1, rows, columns)).bool()


def test_overlap_accuracy_and_boxes():
    score = ForegroundScore((1, 2))
    label = picture((1, slice(0, 10), slice(0, 10)), (2, slice(12, 20), slice(12, 20)), (3, slice(0, 5), slice(15, 20)))
    score.update(mask(slice(0, 10), slice(0, 8))[None], torch.tensor([[0, 0, 8, 10]]), label[None])
    found = score.compute()
    assert found["iou"] == pytest.approx(100 * 80 / 164)
    assert found["acc"] == pytest.approx(100 * (400 - 84) / 400)
    assert (found["corloc"], found["objects"]) == (100, 1)


def test_pictures_without_an_object_are_left_out_and_ignored_pixels_do_not_count():
    score = ForegroundScore((1,))
    label = torch.stack([picture((1, slice(0, 10), slice(0, 20))), picture((3, slice(0, 10), slice(0, 10)))])
    label[0, 10:, :] = 255
    masks = torch.ones(2, 20, 20, dtype=torch.bool)
    score.update(masks, torch.tensor([[0, 0, 20, 20], [0, 0, 20, 20]]), label)
    assert score.compute() == {"iou": 100, "acc": 100, "corloc": 100, "objects": 1}  # the box covers half of 20 x 20


def test_two_objects_of_a_class_have_a_box_each_and_specks_have_none():
    score = ForegroundScore((1,))
    label = picture((1, slice(0, 6), slice(0, 6)), (1, slice(10, 16), slice(10, 16)), (1, slice(19, 20), slice(0, 3)))
    assert score.true_boxes(label) == [[0, 0, 6, 6], [10, 10, 16, 16]]
    score.update(mask(slice(0, 16), slice(0, 16))[None], torch.tensor([[0, 0, 16, 16]]), label[None])
    assert score.compute()["corloc"] == 0  # around both is neither


def test_without_any_object_nothing_is_said():
    score = ForegroundScore((1,))
    score.update(mask(slice(0, 3), slice(0, 3))[None], torch.zeros(1, 4), torch.zeros(1, 20, 20, dtype=torch.int64))
    found = score.compute()
    assert found.pop("objects") == 0
    assert all(math.isnan(value) for value in found.values())


def test_overlap_of_boxes():
    assert overlap([0, 0, 4, 4], [2, 0, 6, 4]) == pytest.approx(8 / 24)
    assert overlap([0, 0, 4, 4], [4, 0, 6, 4]) == 0
    assert overlap([0, 0, 0, 0], [0, 0, 4, 4]) == 0


def test_what_counts_as_an_object():
    assert object_classes(ClassMeta(("background", "cat", "dog")), []) == (1, 2)
    assert object_classes(ClassMeta(("sky", "cat"), things=(1,)), []) == (1,)
    assert object_classes(ClassMeta(("sky", "cat")), []) == ()
    assert object_classes(ClassMeta(("sky", "cat"), things=(1,)), [0]) == (0,)
