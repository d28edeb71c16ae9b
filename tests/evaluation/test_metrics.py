"""The streaming metrics: exact counts, whatever the batches."""

import math

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from evaluation import matching
from evaluation.metrics import ClusterUsage, SegmentationScore
from evaluation.readout import dot_products


def maps(seed, count=6, clusters=5, classes=3):
    generator = torch.Generator().manual_seed(seed)
    pred = torch.randint(clusters, (count, 9, 7), generator=generator)
    values = torch.tensor([*range(classes), 255, -1, classes])
    return pred, values[torch.randint(len(values), (count, 9, 7), generator=generator)]


def slow_counts(pred, target, clusters=5, classes=3):
    counts = np.zeros((clusters, classes), dtype=np.int64)
    for k, c in zip(pred.flatten().tolist(), target.flatten().tolist(), strict=True):
        if 0 <= c < classes:
            counts[k, c] += 1
    return counts


def test_counts_do_not_depend_on_the_batches():
    pred, target = maps(0)
    metric = SegmentationScore(5, 3)
    for part in (slice(0, 1), slice(1, 5), slice(5, 6)):
        metric.update(pred[part], target[part])
    assert metric.counts.dtype == torch.int64
    assert metric.counts.tolist() == slow_counts(pred, target).tolist()
    scores = metric.compute()
    expected = matching.score(slow_counts(pred, target))
    assert (scores.acc, scores.miou) == (expected.acc, expected.miou)
    assert scores.mapping.tolist() == expected.mapping.tolist()
    metric.reset()
    assert metric.counts.sum() == 0


def test_single_class_result_keeps_its_shape():
    metric = SegmentationScore(1, 1)
    metric.update(torch.zeros(1, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.long))
    scores = metric.compute()
    assert scores.iou.shape == scores.mapping.shape == (1,)
    assert scores.acc == 100


def test_no_count_is_lost_beyond_two_to_the_24():
    metric = SegmentationScore(2, 2, matching="identity")
    metric.counts += 2**24
    pred = torch.tensor([[[0, 1, 1]]])
    for _ in range(3):
        metric.update(pred, pred)
    assert metric.counts.tolist() == [[2**24 + 3, 2**24], [2**24, 2**24 + 6]]


def test_small_integer_types_are_taken():
    metric = SegmentationScore(200, 200, matching="identity")
    ids = torch.full((1, 2, 2), 199, dtype=torch.uint8)
    metric.update(ids, ids)
    assert metric.counts[199, 199] == 4


def test_predictions_out_of_range_are_refused_only_where_labelled():
    metric = SegmentationScore(5, 3)
    pred, target = torch.tensor([[[5, 0]]]), torch.tensor([[[255, 0]]])
    metric.update(pred, target)
    assert metric.counts.sum() == 1
    with pytest.raises(ValueError, match=r"1 labelled pixels have a prediction outside 0\.\.4"):
        metric.update(pred, torch.tensor([[[2, 0]]]))
    assert metric.counts.sum() == 1
    with pytest.raises(ValueError, match="differ in shape"):
        metric.update(pred, torch.zeros(1, 2, 1))


def test_policies_are_checked_when_the_metric_is_made():
    with pytest.raises(ConfigError, match=r"evaluation\.extra=all: not one of"):
        SegmentationScore(5, 3, extra="all")
    with pytest.raises(ValueError, match="SegmentationScore needs clusters and classes, got 5 and 0"):
        SegmentationScore(5, 0)


def test_usage_by_hand():
    # Four patches: two on centroid 0 exactly, one on 1 at cosine 0.6, one on 1 exactly; centroid 2 wins nothing.
    codes = torch.tensor([[2.0, 0], [1, 0], [0.8, -0.6], [0, -3]]).T.reshape(1, 2, 2, 2)
    centroids = torch.tensor([[1.0, 0], [0, -1], [-1, 0.1]])
    metric = ClusterUsage(3)
    metric.update(dot_products(codes, centroids), codes)
    result = metric.compute()
    share = [3 / 4, 1 / 4]
    assert result["entropy"] == pytest.approx(-100 * sum(p * math.log(p) for p in share) / math.log(3))
    assert result["confidence"] == pytest.approx(100 * (1 + 1 + 0.8 + 1) / 4)


def test_usage_tells_a_collapse_from_even_use():
    eye = torch.eye(4).reshape(1, 4, 2, 2)
    even, collapsed = ClusterUsage(4), ClusterUsage(4)
    even.update(eye, eye)
    collapsed.update(eye[..., :1, :1], eye[..., :1, :1])
    assert even.compute()["entropy"] == pytest.approx(100)
    assert collapsed.compute()["entropy"] == 0


def test_usage_leaves_out_padding():
    eye = torch.eye(4).reshape(1, 4, 2, 2)
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, :, 5:] = False  # a quarter of the right patches is left
    metric = ClusterUsage(4)
    metric.update(eye, eye, valid)
    assert metric.wins.tolist() == [1, 0, 1, 0]


def test_usage_without_a_patch_or_with_one_cluster_says_nothing():
    codes = torch.ones(1, 2, 1, 1)
    empty, single = ClusterUsage(3), ClusterUsage(1)
    empty.update(torch.ones(1, 3, 1, 1), codes, torch.zeros(1, 4, 4, dtype=torch.bool))
    single.update(codes[:, :1], codes)
    assert all(math.isnan(value) for value in empty.compute().values())
    assert math.isnan(single.compute()["entropy"])
