"""Groups of one picture against its objects and classes."""

import warnings
from types import SimpleNamespace

import pytest
import torch

from common.spec import ClassMeta
from evaluation.slots import (
    RegionClasses,
    SlotScore,
    adjusted_rand,
    best_overlap,
    matched_overlap,
    overlaps,
)

META = ClassMeta(("sky", "car", "bus"), ((0, 0, 0),) * 3, things=(1, 2))
WHOLE = torch.ones(2, 4, dtype=torch.bool)
GROUPS = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 2]])


def score(meta: ClassMeta = META) -> SlotScore:
    return SlotScore("slots", lambda model, batch: batch["groups"], meta)


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


def test_the_index_is_one_for_equal_groupings_and_about_zero_by_chance():
    ids = torch.tensor([0, 0, 1, 1, 2, 2])
    assert adjusted_rand(ids, 2 - ids) == 1
    assert adjusted_rand(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2])) == pytest.approx(4 / 7)
    draws = torch.Generator().manual_seed(0)
    one, two = (torch.randint(0, 5, (20_000,), generator=draws) for _ in range(2))
    assert abs(adjusted_rand(one, two)) < 1e-3


def test_trivial_groupings_have_nothing_to_differ_in():
    assert adjusted_rand(torch.zeros(9, dtype=torch.int64), torch.zeros(9, dtype=torch.int64)) == 1
    assert adjusted_rand(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)) == 1
    assert adjusted_rand(torch.arange(4) // 2, torch.zeros(4, dtype=torch.int64)) == 0


def test_pairs_of_a_large_picture_do_not_overflow():
    """Products of its counts of pairs are beyond int64."""
    ids = torch.arange(400 * 400) % 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert adjusted_rand(ids, ids) == 1
        assert adjusted_rand(torch.arange(400 * 400) % 4, ids) == pytest.approx(0.5, abs=1e-4)


def test_overlaps_leave_out_what_does_not_count_and_objects_of_which_nothing_is_left():
    objects = torch.stack([mask("##..", "##.."), mask("..##", "...#"), mask("....", "..#.")])
    found = overlaps(GROUPS, 3, objects)
    assert found.tolist() == [[1, 0, 0], [0, 2 / 4, 1 / 3], [0, 1 / 3, 0]]
    assert best_overlap(found) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert matched_overlap(found) == pytest.approx((1 + 1 / 3 + 1 / 3) / 3)  # group 1 is for one of them
    counted = mask("####", "##.#")
    assert overlaps(GROUPS, 3, objects, counted).tolist() == [[1, 0, 0], [0, 2 / 3, 1 / 3]]


def test_an_object_that_no_group_is_left_for_counts_as_missed():
    groups = torch.zeros(2, 4, dtype=torch.int64)
    objects = torch.stack([mask("##..", "##.."), mask("..##", "..##")])
    found = overlaps(groups, 1, objects)
    assert best_overlap(found) == 0.5
    assert matched_overlap(found) == 0.25


def test_pictures_are_averaged_and_those_without_an_object_left_out():
    item = score()
    objects = torch.stack([mask("##..", "##.."), mask("..##", "..##")])
    batch = {
        "groups": torch.stack([GROUPS, GROUPS, torch.zeros_like(GROUPS)]),
        "valid": WHOLE.expand(3, -1, -1),
        "instances": [objects, objects[:0], objects[:1]],
        "instances.crowd": [torch.zeros(2, dtype=torch.bool), torch.zeros(0, dtype=torch.bool),
                            torch.zeros(1, dtype=torch.bool)],
    }  # fmt: skip
    assert item.see(None, batch, None)["slots"] is batch["groups"]
    found = item.compute()
    assert found["mbo_i"] == pytest.approx(100 * ((1 + 3 / 4) / 2 + 1 / 2) / 2)
    assert found["fg_ari"] == pytest.approx(
        100 * (adjusted_rand(GROUPS.flatten(), objects[1].long().flatten()) + 1) / 2
    )
    assert found["fg_ari_several"] < found["fg_ari"]  # the last picture shows one object, and one group holds it
    assert found["ari"] < found["fg_ari"]  # of the last picture 0, as all of it is one group
    assert "mbo_c" not in found
    item.reset()
    item.means.update()
    assert item.compute() == {}


def test_pixels_of_two_objects_and_of_crowds_count_nowhere():
    masks = torch.stack([mask("###.", "##.."), mask("..##", "..##"), mask("....", "...#")])
    item, crowd = score(), torch.tensor([False, False, True])
    item.update_objects(GROUPS, masks, crowd, WHOLE)
    assert item.compute()["mbo_i"] == 100  # but for them, groups 0 and 1 are the objects
    assert item.compute()["fg_ari"] == 100


def test_classes_are_those_that_count_as_objects_with_all_their_pieces():
    item = score()
    label = torch.tensor([[1, 0, 2, 2], [1, 255, 1, 2]])
    item.update_classes(GROUPS, label)
    assert item.compute() == {"mbo_c": pytest.approx(100 * (2 / 4 + 2 / 4) / 2)}
    item.update_classes(GROUPS, torch.zeros_like(label))  # shows no object
    assert item.compute() == {"mbo_c": pytest.approx(50)}


def test_without_labels_or_objects_nothing_is_said():
    item = score(ClassMeta())
    item.see(None, {"groups": GROUPS[None], "valid": WHOLE[None]}, None)
    assert item.compute() == {}


def test_regions_of_no_cluster_are_matched_with_nothing():
    """Three regions side by side; the second has no cluster, the others are clusters 1 and 0 of two."""
    masks = torch.eye(3)[None, :, None, :].repeat(1, 1, 2, 1)
    model = SimpleNamespace(clustered_regions=lambda batch: (masks, torch.tensor([[1, -1, 0]])))
    rules = SimpleNamespace(matching="hungarian_iou", extra="drop", absent="skip", background=0)
    item = RegionClasses(2, ClassMeta(("a", "b"), ((0, 0, 0),) * 2), rules)
    label = torch.tensor([[[0, 0, 1]] * 2])
    item.see(model, {"image": torch.zeros(1, 3, 2, 3), "label": label}, None)
    found = item.compute()
    assert found.counts.tolist() == [[0, 2], [2, 0], [2, 0]]
    assert found.mapping.tolist() == [1, 0, -1]
    assert found.iou.tolist() == [50, 100]
    assert found.acc == pytest.approx(100 * 4 / 6)
