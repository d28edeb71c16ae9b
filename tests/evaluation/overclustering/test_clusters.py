"""Clusters of codes whose classes are plain to see: over-clusters, foreground, communities."""

import dataclasses
import math

import pytest
import torch

from common.errors import ConfigError
from evaluation.overclustering import clusters
from evaluation.overclustering.communities import CommunityFinder, Grouping
from evaluation.overclustering.pictures import Picture

RULES = clusters.Rules(
    classes=3, seed=0, iterations=20, restarts=2, points=None, absent="zero", background=0, device=torch.device("cpu")
)
SIDE = 6
PLACES = torch.arange(SIDE)


def picture(index, parts, mask=None):
    """A picture of 6 x 6 patches, each a place, whose columns 0-1, 2-3 and 4-5 show these parts. A part is a direction,
    and its class is that of the part halved: parts 0 and 1 are background, 2 and 3 class 1, 4 and 5 class 2."""
    shown = torch.tensor(parts).repeat_interleave(2).expand(SIDE, SIDE)
    noise = torch.randn(SIDE * SIDE, 6, generator=torch.Generator().manual_seed(index)) * 0.02
    points = torch.eye(6)[shown.flatten()] + noise
    label = (shown // 2).to(torch.uint8)
    return Picture(index, points, (SIDE, SIDE), PLACES, PLACES, label, label > 0 if mask is None else mask)


def some():
    """Parts of one class always lie beside each other."""
    return [picture(0, [0, 2, 3]), picture(1, [1, 4, 5]), picture(2, [0, 3, 2]), picture(3, [1, 5, 4])]


def test_over_clusters_are_named_by_precision():
    found = clusters.over_clusters(some(), 6, 3, RULES)
    assert found.values == {"acc": 100, "acc_std": 0, "miou": 100, "miou_std": 0}
    parts = found.centroids.argmax(1)
    assert found.classes.tolist() == (parts // 2).tolist()


def test_as_many_clusters_as_classes_are_matched_one_to_one():
    """Two parts fall together at least, so a class of the three cannot be whole; a single seed has no spread."""
    found = clusters.over_clusters(some(), 3, 1, RULES)
    assert set(found.values) == {"acc", "miou"}
    assert sorted(found.classes.tolist()) == [0, 1, 2]


def test_pixels_without_a_label_count_nowhere():
    every = some()
    unknown = dataclasses.replace(every[0], label=torch.full_like(every[0].label, 255))
    found = RULES.counts([unknown, every[1]], [torch.zeros(36, dtype=torch.int64)] * 2, 1)
    assert found.tolist() == [[12, 0, 24]]


def extracted(threshold, trained=(), scored=None):
    return clusters.extract(list(trained), some() if scored is None else scored, 6, threshold, [1, 2], RULES)


def test_clusters_are_foreground_though_the_mask_missed_them_once():
    """A mask that is off in one picture of two leaves its clusters at precision 1/2."""
    every = some()
    every[0] = dataclasses.replace(every[0], mask=torch.zeros(SIDE, SIDE, dtype=torch.bool))
    found = extracted(0.5, scored=every)
    assert [torch.equal(inside.view(SIDE, SIDE), item.label > 0)
            for inside, item in zip(found.scored.inside, every, strict=True)] == [True] * 4  # fmt: skip
    assert clusters.objects_found(found.scored, [1, 2]) == {"share": pytest.approx(100 * 2 / 3), "iou": 100}
    assert clusters.objects_found(found.scored, []) == {"share": pytest.approx(100 * 2 / 3)}
    assert len(extracted(0.6, scored=every).foreground) == 2


def test_labels_of_training_pictures_choose_the_cut():
    found = extracted(None, trained=some())
    assert found.threshold == pytest.approx(0.95)
    assert len(found.foreground) == 4
    assert len(found.all.pictures) == 8
    unlabelled = [dataclasses.replace(item, label=None) for item in some()]
    with pytest.raises(ConfigError, match=r"evaluation\.cbfe\.cut=labels: no training picture that was read has a lab"):
        extracted(None, trained=unlabelled)


def test_clusters_of_the_foreground_are_scored_beside_the_background(caplog):
    found = clusters.foreground_clusters(extracted(0.5), 4, 2, RULES)
    assert set(found) == {"acc", "acc_std", "miou", "miou_std"}
    assert found["miou"] == pytest.approx(50)  # one-to-one: the second part of each class becomes background
    assert clusters.foreground_clusters(extracted(1.1), 2, 2, RULES) == {}
    assert "0 patches are foreground, fewer than the 2 clusters" in caplog.text


def finder(**changes):
    return CommunityFinder(
        extracted(0.5, **changes), algorithm="louvain", angles="eight", distances=[1], count=2, rules=RULES
    )


def test_communities_join_the_parts_of_a_class():
    """Parts of a class lie beside each other and beside their background: a long time joins all."""
    found = finder().run(Grouping(4, 0.3, 1.0), 3)
    assert found.values["miou"] > 60
    parts = found.centroids.argmax(1) // 2
    for one, group in zip(parts, found.groups[:4], strict=True):
        for two, other in zip(parts, found.groups[:4], strict=True):
            assert (one == two) == (group == other)
    assert found.values["count"] == len(found.groups.unique())


def test_too_few_patches_are_no_communities(caplog):
    assert finder().run(Grouping(97, 0.3, 1.0), 1) is None
    assert "96 patches are foreground, fewer than the 97 clusters" in caplog.text


def test_without_labels_there_are_communities_and_no_scores():
    unlabelled = [dataclasses.replace(item, label=None) for item in some()]
    found = finder(scored=unlabelled).run(Grouping(4, 0.3, 1.0), 1)
    assert set(found.values) == {"count"}
    assert found.classes is None


def test_a_search_takes_what_is_best_on_the_training_pictures():
    own = finder(trained=some())
    found = own.searched(3)
    assert found == finder(trained=some()).searched(3)
    assert 0.01 <= found.weight <= 0.1
    assert 0.1 <= found.time <= 2
    best = own.scores(found, 0, of_training=True).miou
    assert not math.isnan(best)
