"""From the counts of a whole validation set to scores: match clusters to classes, then accuracy and IoU.

Everything here is a pure function of one int64 matrix `counts` [K,C]: rows are predicted clusters, columns true
classes, an entry is the number of labelled pixels. Notation: n = counts, r_k = row sum, t_c = column sum (pixels of
class c), N = sum of n, m(k) = class of cluster k or -1. Labels are used for nothing but the matching and the score.
Sources: UnsupervisedMetrics of STEGO (Hamilton et al., ICLR 2022), PriMaPs (Hahn et al., TMLR 2024) for `merge`,
MaskContrast (Van Gansbeke et al., ICCV 2021) for matching by IoU and by majority.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from common.errors import ConfigError, one_of

UNMATCHED = -1
MATCHINGS = ("hungarian", "hungarian_iou", "many_to_one", "many_to_one_iou")
EXTRAS = ("drop", "background", "rest", "merge", "stego_compat")
ABSENTS = ("skip", "zero")


@dataclass
class Scores:
    """The result of one probe on one validation set. Percentages; NaN where nothing can be said."""

    acc: float
    """Share of labelled pixels whose cluster is mapped to their class; NaN without a labelled pixel."""
    miou: float
    """Mean of the class IoUs that count."""
    iou: np.ndarray
    """[C] float64; NaN for a class that is skipped."""
    mapping: np.ndarray
    """[K] int64 class of each cluster, -1 unmatched."""
    counts: np.ndarray
    """[K,C] int64 as counted, nothing dropped."""
    histogram: np.ndarray
    """[C+1,C] int64: predicted class x true class; the last row holds the pixels of unmatched clusters."""
    matching: str
    extra: str
    absent: str


def score(
    counts, matching: str = "hungarian", extra: str = "merge", absent: str = "skip", background: int = 0, loose: int = 0
) -> Scores:
    """Match, then score one confusion matrix.

    counts: [K,C] whole numbers (tensor or array). With h = `class_histogram(counts, m)`, p_c = row sum c of h and
    h_cc its diagonal: acc = sum_c h_cc / N; IoU_c = h_cc / (p_c + t_c - h_cc); miou = mean over classes.

    matching (see `match`): `hungarian`, `hungarian_iou`, `many_to_one`, `many_to_one_iou`, or `identity` for
    classifiers that were trained with labels (K = C, m(k) = k).

    extra: what happens to the clusters that a one-to-one matching leaves over (K > C):
    - `drop`: m(k) = -1. Their pixels stay in N and t_c, so they count as errors, in no predicted class.
    - `background`: m(k) = `background`.
    - `rest`: the same, but `background` takes no part in the matching: it is what no cluster of another class is, as
      DINOSAUR scores VOC.
    - `merge`: m(k) = argmax_c n_kc, the class they overlap most (PriMaPs); ties, and clusters without a pixel, go to
      the lowest class id.
    - `stego_compat`: as released. Pixels with k >= C are thrown away first (they leave N and t_c), the rest is matched;
      clusters k < C without a class form one further row whose IoU counts in the mean. Inflated when K > C. Where all
      pixels are thrown away, which the release gives no number for, all scores are 0.

    loose: the last so many rows are no clusters but pixels without one. No matching takes them; they are errors, or
    background with `background` and `rest`.

    absent: a class that is in neither labels nor predictions has IoU 0/0. `skip` leaves it out of the mean (NaN in
    `iou`), `zero` counts it as 0. A class absent from the labels but predicted has IoU 0 either way.

    Raises ConfigError for an unknown policy or a combination that the release does not have.
    """
    counts = as_counts(counts)
    check_policies(matching, extra, absent)
    classes = counts.shape[1]
    kept = counts
    if extra == "stego_compat":
        kept = counts.copy()
        kept[classes:] = 0
    if extra in ("background", "rest") and not 0 <= background < classes:
        raise ConfigError(f"evaluation.background={background}: expected a class id from 0 to {classes - 1}")
    mapping = match(kept, matching, loose, background if extra == "rest" else None)
    left = mapping == UNMATCHED
    if extra == "merge":
        left[len(left) - loose :] = False
        mapping[left] = kept[left].argmax(1)
    elif extra in ("background", "rest"):
        mapping[left] = background
    histogram = class_histogram(kept, mapping)
    if extra == "stego_compat" and len(counts) > classes:
        table = with_extra_row(histogram)
        rows = jaccard(table)
        iou, acc = rows[:classes], accuracy(table)
    else:
        iou, acc = jaccard(histogram), accuracy(histogram)
        if absent == "zero":
            iou = np.nan_to_num(iou, nan=0.0)
        rows = iou
    if counts.any() and not kept.any():  # stego_compat: every pixel is thrown away, so none is right
        acc, iou = 0.0, np.where(counts.any(axis=0), 0.0, np.nan)
        rows = iou
    return Scores(100 * acc, 100 * mean(rows), 100 * iou, mapping, counts, histogram, matching, extra, absent)


def told_apart(scores: Scores) -> Scores:
    """The scores, or none where all labelled pixels are of one class: whatever is predicted, some cluster fits it."""
    if np.count_nonzero(scores.counts.sum(0)) > 1:
        return scores
    return replace(scores, acc=math.nan, miou=math.nan, iou=np.full_like(scores.iou, math.nan))


def check_policies(matching: str, extra: str, absent: str) -> None:
    """Raises ConfigError for names that do not exist or do not go together."""
    for key, value, known in (
        ("matching", matching, (*MATCHINGS, "identity")), ("extra", extra, EXTRAS), ("absent", absent, ABSENTS)
    ):  # fmt: skip
        one_of(f"evaluation.{key}", value, known)
    if extra == "stego_compat" and matching not in ("hungarian", "identity"):
        raise ConfigError(f"evaluation.extra=stego_compat: the release matches with hungarian only, not {matching}")
    if extra == "stego_compat" and absent != "skip":
        raise ConfigError("evaluation.extra=stego_compat: the release skips absent classes; set evaluation.absent=skip")


def as_counts(counts) -> np.ndarray:
    """A tensor or array of whole numbers as int64 [K,C]. Raises ValueError for another rank or for fractions."""
    array = counts.detach().cpu().numpy() if hasattr(counts, "detach") else np.asarray(counts)
    if array.ndim != 2 or 0 in array.shape or array.dtype.kind not in "iu":
        raise ValueError(f"counts: expected whole numbers [K,C], got {array.dtype} of shape {tuple(array.shape)}")
    return array.astype(np.int64)


def match(counts: np.ndarray, matching: str, loose: int = 0, out: int | None = None) -> np.ndarray:
    """Clusters to classes: [K,C] int64 -> m [K] int64, -1 where a one-to-one matching leaves a cluster over.

    The last `loose` rows are no clusters, and class `out` is no cluster's: their pixels count in unions alone.


    - `hungarian`: one-to-one, maximises sum_k n[k, m(k)] (the field's protocol; maximises accuracy).
    - `hungarian_iou`: one-to-one, maximises the sum of `iou_matrix`.
    - `many_to_one`: m(k) = argmax_c n_kc. `many_to_one_iou`: m(k) = argmax_c of `iou_matrix`.
    - `identity`: m(k) = k; raises ValueError unless K = C.
    Deterministic. Ties of an arg max go to the lowest class id, ties of an assignment to scipy's order.
    """
    clusters, classes = counts.shape
    if matching == "identity":
        if clusters != classes:
            raise ValueError(f"matching=identity needs as many outputs as classes, got {clusters} and {classes}")
        return np.arange(clusters)
    gain = iou_matrix(counts) if matching.endswith("_iou") else counts
    rows, columns = np.arange(clusters - loose), np.delete(np.arange(classes), [] if out is None else [out])
    gain = gain[np.ix_(rows, columns)]
    mapping = np.full(clusters, UNMATCHED, dtype=np.int64)
    if matching.startswith("many_to_one"):
        mapping[rows] = columns[gain.argmax(1)]
    else:
        rows, found = linear_sum_assignment(gain, maximize=True)
        mapping[rows] = columns[found]
    return mapping


def iou_matrix(counts: np.ndarray) -> np.ndarray:
    """IoU of every cluster with every class: n_kc / (r_k + t_c - n_kc), 0 where both are empty. [K,C] float64."""
    union = counts.sum(1, keepdims=True) + counts.sum(0, keepdims=True) - counts
    return counts / np.maximum(union, 1)


def precision_matrix(counts: np.ndarray) -> np.ndarray:
    """Share of every cluster that is of each class, n_kc / r_k, 0 for an empty cluster: [K,C] float64.

    Its arg max over classes is that of n_kc, so `many_to_one` matches by precision, as Leopart does above C clusters.
    """
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def class_histogram(counts: np.ndarray, mapping: np.ndarray) -> np.ndarray:
    """Rows of clusters added up by their class: [K,C], [K] -> [C+1,C] int64, unmatched clusters in the last row."""
    classes = counts.shape[1]
    histogram = np.zeros((classes + 1, classes), dtype=np.int64)
    np.add.at(histogram, np.where(mapping == UNMATCHED, classes, mapping), counts)
    return histogram


def with_extra_row(histogram: np.ndarray) -> np.ndarray:
    """[C+1,C] -> [C+1,C+1]: a class without true pixels is added, so that the last row scores as a class of its own.

    So the released evaluation counts unmatched clusters: their IoU is 0, or NaN where no pixel fell into them.
    """
    return np.pad(histogram, ((0, 0), (0, 1)))


def jaccard(histogram: np.ndarray) -> np.ndarray:
    """IoU of each column's class, 0..1: [C or more rows, C] -> [C] float64, NaN where 0/0. Rows beyond C only miss."""
    classes = histogram.shape[1]
    hits = np.diagonal(histogram).astype(np.float64)
    union = histogram.sum(0) + histogram[:classes].sum(1) - hits
    return np.divide(hits, union, out=np.full(classes, np.nan), where=union > 0)


def accuracy(histogram: np.ndarray) -> float:
    """Diagonal over everything, 0..1; NaN for an empty matrix."""
    total = int(histogram.sum())
    return int(np.trace(histogram)) / total if total else float("nan")


def mean(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN when there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else float("nan")


def released_map(mapping: np.ndarray) -> np.ndarray:
    """The cluster -> class map as STEGO's `map_clusters` gives it, [K] -> [K] int64.

    The release inserts the -1 of an unmatched cluster one position too late unless it stands at the end, which shifts
    the classes between. Only for comparison with pictures made by the released code.
    """
    result = mapping[mapping != UNMATCHED]
    for missing in np.flatnonzero(mapping == UNMATCHED):
        result = np.insert(result, min(missing + 1, len(result)), UNMATCHED)
    return result


def partition(
    scores: Scores, groups: Mapping[str, Sequence[int]], restricted: bool = False
) -> dict[str, tuple[float, float]]:
    """(acc, miou) in percent of groups of classes, such as things and stuff, always by class and never by cluster id.

    For a group G: acc = sum_{c in G} h_cc / sum_{c in G} t_c; miou = mean of IoU_c over G. With `restricted` the
    histogram is cut to G x G first (pixels predicted outside the group are left out): what PiCIE (Cho et al., CVPR
    2021) set out to report; its release cuts by cluster id. Raises ValueError for a class id out of range.
    """
    classes = scores.histogram.shape[1]
    result = {}
    for name, group in groups.items():
        ids = np.asarray(group, dtype=np.int64)
        if ids.size == 0 or ids.min() < 0 or ids.max() >= classes:
            raise ValueError(f"group {name}: expected class ids from 0 to {classes - 1}, got {list(group)}")
        if restricted:
            part = scores.histogram[np.ix_(ids, ids)]
            result[name] = (100 * accuracy(part), 100 * mean(jaccard(part)))
        else:
            pixels = int(scores.histogram[:, ids].sum())
            hits = int(scores.histogram[ids, ids].sum())
            result[name] = (100 * hits / pixels if pixels else float("nan"), mean(scores.iou[ids]))
    return result
