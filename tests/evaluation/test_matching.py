"""Matching and scores against hand-made matrices and slow, plain computations."""

import itertools

import numpy as np
import pytest
import torch

from common.errors import ConfigError
from evaluation import matching

# Rows are clusters, columns classes. One-to-one by pixels: 0 -> 1 (8), 1 -> 0 (6), 2 is left over.
HAND = np.array([[1, 8], [6, 2], [1, 4]])


def plain_scores(counts: np.ndarray, mapping) -> tuple[float, list[float]]:
    """acc and IoUs in percent from pixel lists: every labelled pixel is written out."""
    pred, true = [], []
    for (k, c), n in np.ndenumerate(counts):
        pred += [mapping[k]] * int(n)
        true += [c] * int(n)
    pred, true = np.array(pred), np.array(true)
    iou = []
    for c in range(counts.shape[1]):
        union = ((pred == c) | (true == c)).sum()
        iou.append(100 * ((pred == c) & (true == c)).sum() / union if union else np.nan)
    return 100 * (pred == true).mean(), iou


def test_drop_by_hand():
    scores = matching.score(HAND, extra="drop")
    assert scores.mapping.tolist() == [1, 0, -1]
    assert scores.acc == pytest.approx(100 * 14 / 22)
    assert scores.iou == pytest.approx([100 * 6 / (8 + 8 - 6), 100 * 8 / (9 + 14 - 8)])
    assert scores.miou == pytest.approx((60 + 100 * 8 / 15) / 2)
    assert scores.histogram.tolist() == [[6, 2], [1, 8], [1, 4]]
    assert scores.counts.tolist() == HAND.tolist()


def test_merge_by_hand():
    scores = matching.score(HAND, extra="merge")
    assert scores.mapping.tolist() == [1, 0, 1]
    assert scores.acc == pytest.approx(100 * 18 / 22)
    assert scores.iou == pytest.approx([60.0, 100 * 12 / (14 + 14 - 12)])


def test_background_by_hand():
    scores = matching.score(HAND, extra="background", background=0)
    assert scores.mapping.tolist() == [1, 0, 0]
    assert scores.acc == pytest.approx(100 * 15 / 22)
    assert scores.iou == pytest.approx([100 * 7 / (13 + 8 - 7), 100 * 8 / 15])


def test_stego_compat_throws_away_the_pixels_of_extra_clusters():
    scores = matching.score(HAND, extra="stego_compat")
    assert scores.mapping.tolist() == [1, 0, -1]
    assert scores.acc == pytest.approx(100 * 14 / 17)  # the 5 pixels of cluster 2 are gone
    assert scores.iou == pytest.approx([100 * 6 / (8 + 7 - 6), 100 * 8 / (9 + 10 - 8)])
    assert scores.miou == pytest.approx(np.mean(scores.iou))
    assert scores.counts.tolist() == HAND.tolist()


def test_stego_compat_counts_the_extra_row_when_it_holds_pixels():
    # Cluster 2 (an extra one) is thrown away; the absent class 2 may take it, an empty row, or cluster 1: gain 0 each.
    counts = np.array([[5, 0], [3, 0], [0, 4], [0, 0]])
    scores = matching.score(counts, extra="stego_compat")
    table = matching.with_extra_row(scores.histogram)
    assert scores.histogram.sum() == 8  # rows 2 and 3 do not exist for the release
    assert scores.miou == pytest.approx(100 * matching.mean(matching.jaccard(table)))


def test_hungarian_is_the_best_of_all_one_to_one_matchings():
    generator = np.random.default_rng(0)
    for clusters, classes in ((4, 4), (5, 3), (3, 5)):
        for _ in range(20):
            counts = generator.integers(0, 40, (clusters, classes))
            few, many = sorted((clusters, classes))
            for name, gain in (("hungarian", counts), ("hungarian_iou", matching.iou_matrix(counts))):
                best = max(
                    sum(gain[(i, j) if clusters <= classes else (j, i)] for i, j in enumerate(order))
                    for order in itertools.permutations(range(many), few)
                )
                mapping = matching.match(counts, name)
                matched = np.flatnonzero(mapping >= 0)
                assert len(matched) == few == len(set(mapping[matched].tolist()))
                assert gain[matched, mapping[matched]].sum() == pytest.approx(best)


def test_scores_equal_a_count_over_written_out_pixels():
    generator = np.random.default_rng(1)
    for name, extra in itertools.product(matching.MATCHINGS, ("drop", "background", "merge")):
        counts = generator.integers(0, 30, (7, 4))
        scores = matching.score(counts, name, extra)
        acc, iou = plain_scores(counts, scores.mapping)
        assert scores.acc == pytest.approx(acc)
        assert scores.iou == pytest.approx(iou)
        assert scores.miou == pytest.approx(np.mean(iou))


def test_iou_matching_differs_from_pixel_matching_where_a_class_is_rare():
    counts = np.array([[485, 0], [500, 10]])
    assert matching.match(counts, "hungarian").tolist() == [1, 0]  # 500 + 0 pixels against 485 + 10
    # By IoU: 485/985 + 10/510 = 0.512 against 0 + 500/995 = 0.503.
    assert matching.match(counts, "hungarian_iou").tolist() == [0, 1]


def test_many_to_one_takes_the_majority_or_the_largest_iou():
    counts = np.array([[50, 20], [100, 0], [200, 0]])
    assert matching.match(counts, "many_to_one").tolist() == [0, 0, 0]
    assert matching.match(counts, "many_to_one_iou").tolist() == [1, 0, 0]  # 50/370 against 20/70


@pytest.mark.parametrize("name", matching.MATCHINGS)
@pytest.mark.parametrize("extra", ["drop", "background", "merge"])
@pytest.mark.parametrize("clusters", [5, 8])
def test_renaming_clusters_changes_no_score(name, extra, clusters):
    generator = np.random.default_rng(clusters)
    counts = generator.integers(1, 10**6, (clusters, 5))  # large numbers: no ties
    order = generator.permutation(clusters)
    first, second = matching.score(counts, name, extra), matching.score(counts[order], name, extra)
    assert second.mapping.tolist() == first.mapping[order].tolist()
    assert (second.acc, second.miou) == (first.acc, first.miou)
    assert second.iou.tolist() == first.iou.tolist()


def test_absent_classes():
    counts = np.array([[9, 0, 1], [0, 0, 0], [2, 0, 8]])  # class 1 has no pixel, cluster 1 is never predicted
    skipped = matching.score(counts, absent="skip")
    assert np.isnan(skipped.iou[1])
    assert skipped.miou == pytest.approx((100 * 9 / 12 + 100 * 8 / 11) / 2)
    zero = matching.score(counts, absent="zero")
    assert zero.iou[1] == 0
    assert zero.miou == pytest.approx(skipped.miou * 2 / 3)
    counts[1, 0] = 3  # now the cluster of the absent class is predicted: IoU 0 under either policy
    assert matching.score(counts, absent="skip").iou[1] == 0
    assert matching.score(counts, absent="skip").miou == matching.score(counts, absent="zero").miou


def test_fewer_clusters_than_classes():
    scores = matching.score(np.array([[7, 1, 0], [0, 2, 5]]))
    assert scores.mapping.tolist() == [0, 2]
    assert scores.iou == pytest.approx([700 / 8, 0.0, 500 / 7])


def test_nothing_labelled_gives_nan_and_not_zero():
    scores = matching.score(np.zeros((3, 3), dtype=np.int64))
    assert np.isnan(scores.acc)
    assert np.isnan(scores.miou)


def test_identity_needs_as_many_outputs_as_classes():
    assert matching.score(HAND[:2], "identity").acc == pytest.approx(100 * 3 / 17)
    with pytest.raises(ValueError, match="matching=identity needs as many outputs as classes, got 3 and 2"):
        matching.score(HAND, "identity")


def test_released_map_shifts_the_classes_after_an_unmatched_cluster():
    mapping = np.array([0, 2, -1, 1, 4, -1, 3])
    assert matching.released_map(mapping).tolist() == [0, 2, 1, -1, 4, 3, -1]
    tail = np.array([0, 3, 2, 1, 4, -1, -1])
    assert matching.released_map(tail).tolist() == tail.tolist()


def test_counts_of_tensors_and_beyond_float32():
    counts = torch.tensor([[2**40 + 1, 0], [1, 2**40]])
    scores = matching.score(counts)
    assert scores.counts.tolist() == counts.tolist()
    assert scores.acc == 100 * (2**41 + 1) / (2**41 + 2)


def test_partition_is_by_class_and_not_by_cluster():
    counts = np.array([[0, 0, 9, 1], [0, 8, 0, 0], [10, 2, 1, 0], [0, 0, 2, 7]])
    scores = matching.score(counts)
    assert scores.mapping.tolist() == [2, 1, 0, 3]
    parts = matching.partition(scores, {"thing": [0, 1], "stuff": [2, 3]})
    assert parts["thing"] == pytest.approx((100 * 18 / 20, (100 * 10 / 13 + 80) / 2))
    assert parts["stuff"] == pytest.approx((100 * 16 / 20, (100 * 9 / 13 + 70) / 2))
    inside = matching.partition(scores, {"stuff": [2, 3]}, restricted=True)["stuff"]
    assert inside == pytest.approx((100 * 16 / 19, (100 * 9 / 12 + 70) / 2))
    with pytest.raises(ValueError, match=r"group x: expected class ids from 0 to 3, got \[4\]"):
        matching.partition(scores, {"x": [4]})


REST = np.array([[6, 1, 0], [5, 4, 1], [0, 2, 3], [9, 0, 1]])
"""Clusters 0 and 3 lie on class 0."""


def test_a_background_that_takes_part_in_no_matching_is_what_other_classes_leave():
    """By number cluster 3 would be class 0 itself, and cluster 0 the one left over, for a background or not."""
    found = matching.score(REST, "hungarian_iou", "rest")
    assert found.mapping.tolist() == [0, 1, 2, 0]
    assert found.iou[0] == pytest.approx(100 * 15 / (20 + 17 - 15))
    with_it = matching.score(REST, "hungarian_iou", "background", background=1)
    assert with_it.mapping.tolist() == [1, 1, 2, 0]
    assert matching.score(REST, "hungarian_iou", "rest", background=1).mapping.tolist() == [1, 1, 2, 0]
    with pytest.raises(ConfigError, match=r"evaluation\.background=3: expected a class id from 0 to 2"):
        matching.score(REST, extra="rest", background=3)


@pytest.mark.parametrize("matched", ["hungarian", "hungarian_iou", "many_to_one", "many_to_one_iou"])
def test_pixels_without_a_cluster_are_matched_with_nothing(matched):
    counts = np.array([[5, 1], [1, 2], [90, 80]])
    dropped = matching.score(counts, matched, "drop", loose=1)
    assert dropped.mapping.tolist() == [0, 1, -1]
    assert dropped.acc == pytest.approx(100 * 7 / 179)
    assert dropped.iou[1] == pytest.approx(100 * 2 / (83 + 3 - 2))
    assert matching.score(counts, matched, "merge", loose=1).mapping.tolist() == [0, 1, -1]
    assert matching.score(counts, matched, "background", background=1, loose=1).mapping.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ({"matching": "best"}, "evaluation.matching=best: not one of hungarian, hungarian_iou, many_to_one, "
         "many_to_one_iou, identity"),
        ({"extra": "keep"}, "evaluation.extra=keep: not one of drop, background, rest, merge, stego_compat"),
        ({"absent": "one"}, "evaluation.absent=one: not one of skip, zero"),
        ({"matching": "many_to_one", "extra": "stego_compat"},
         "evaluation.extra=stego_compat: the release matches with hungarian only, not many_to_one"),
        ({"extra": "stego_compat", "absent": "zero"},
         "evaluation.extra=stego_compat: the release skips absent classes; set evaluation.absent=skip"),
        ({"extra": "background", "background": 2}, "evaluation.background=2: expected a class id from 0 to 1"),
    ],
)  # fmt: skip
def test_unknown_policies_are_refused(words, text):
    with pytest.raises(ConfigError) as error:
        matching.score(HAND, **words)
    assert str(error.value) == text


def test_counts_must_be_whole_numbers():
    with pytest.raises(ValueError, match=r"counts: expected whole numbers \[K,C\], got float64 of shape \(2, 2\)"):
        matching.score(np.ones((2, 2)))


def test_one_cluster_beyond_the_classes_that_takes_all_scores_nothing():
    """The release throws its pixels away and divides nothing by nothing; null would win or lose no comparison."""
    counts = np.zeros((4, 3), dtype=int)
    counts[3] = [5, 2, 0]
    found = matching.score(counts, extra="stego_compat")
    assert (found.acc, found.miou) == (0.0, 0.0)
    assert found.iou.tolist()[:2] == [0.0, 0.0]
    assert np.isnan(found.iou[2])
    first = matching.score(counts[[3, 0, 1, 2]], extra="stego_compat")
    assert (round(first.acc, 4), first.miou > 0) == (71.4286, True)
