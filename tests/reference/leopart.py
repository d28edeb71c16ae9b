"""Adapters for `leopart.*`: the read-outs of the released evaluation."""

import numpy as np
import torch
from torch import Tensor

from evaluation import matching
from evaluation.overclustering import foreground, graph
from grouping.attention_masks import attention_foreground as foreground_of

Case = dict[str, np.ndarray]


def _ids(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.int64))


def _counts(pred: np.ndarray, truth: np.ndarray, clusters: int, classes: int) -> np.ndarray:
    counts = np.zeros((clusters, classes), np.int64)
    np.add.at(counts, (pred, truth), 1)
    return counts


def _scored(case: Case, truth: str, classes: int, policy: str) -> matching.Scores:
    counts = _counts(case["in_pred"], case[truth], int(case["cfg_num_pred"]), classes)
    return matching.score(counts, policy, "background", "zero")


def attention_foreground(case: Case) -> Case:
    weights = torch.from_numpy(case["in_attention_headmean"])[:, 0]
    found = {
        f"out_mask_thr{name}": foreground_of(weights, mass)[:, None] for name, mass in (("06", 0.6), ("065", 0.65))
    }
    return {name: mask.numpy() for name, mask in found.items()}


def miou_hungarian(case: Case) -> Case:
    classes = int(case["cfg_num_gt"])
    found = _scored(case, "in_gt", classes, "hungarian_iou")
    plain = _scored(case, "in_gt", classes, "identity")
    fewer = _scored(case, "in_gt4", int(case["in_gt4"].max()) + 1, "hungarian_iou")
    hits = np.diagonal(found.histogram)
    return {
        "out_miou": np.array(found.miou / 100),
        "out_tp": hits,
        "out_fp": found.histogram[:classes].sum(1) - hits,
        "out_fn": found.histogram.sum(0) - hits,
        "out_reordered": found.mapping[case["in_pred"]],
        "out_score_matrix_iou": matching.iou_matrix(found.counts).T,
        "out_miou_no_matching": np.array(plain.miou / 100),
        "out_miou_partial": np.array(fewer.miou / 100),
        "out_reordered_partial": fewer.mapping[case["in_pred"]],
    }


def miou_manytoone(case: Case) -> Case:
    results = {}
    for name, policy in (("iou", "many_to_one_iou"), ("precision", "many_to_one")):
        found = _scored(case, "in_gt", int(case["cfg_num_gt"]), policy)
        results[f"out_miou_{name}_based"] = np.array(found.miou / 100)
        results[f"out_reordered_{name}_based"] = found.mapping[case["in_pred"]]
        results[f"out_bg_fraction_{name}_based"] = np.array((found.mapping == 0).mean())
    results["out_score_matrix_precision"] = matching.precision_matrix(found.counts).T
    return results


def cbfe(case: Case) -> Case:
    clusters, truth = _ids(case["in_clusters"])[:, 0], _ids(case["in_gt"])[:, 0]
    masks, k = torch.from_numpy(case["in_attention_mask"])[:, 0] > 0, int(case["cfg_k"])
    objects = [value for value in range(255) if value]
    precision = foreground.precisions(clusters, masks, k)
    cuts = foreground.cuts(clusters, truth, objects, precision)
    threshold = foreground.chosen(cuts)
    ids = foreground.above(precision, threshold)
    found = torch.isin(clusters, ids)
    return {
        "out_cluster_precision": precision.numpy(),
        "out_cuts_precision_start_iou": np.array(cuts),
        "out_threshold_rounded": np.array(threshold),
        "out_foreground_cluster_ids": ids.numpy(),
        "out_mask": found[:, None].numpy(),
        "out_mean_fg_iou_boundary_as_fg": np.array(foreground.overlap(found, truth, objects, "foreground")),
        "out_mean_fg_iou_without_boundary": np.array(foreground.overlap(found, truth, objects, "background")),
    }


def cooccurrence(case: Case) -> Case:
    clusters, k = _ids(case["in_clusters"])[:, 0], int(case["cfg_num_clusters"])
    matrix = graph.cooccurrence(clusters, k, case["cfg_distances"].tolist(), "released")
    return {
        "out_matrix": matrix.numpy(),
        "out_edges": np.array(graph.edges(matrix, float(case["cfg_weight_threshold"]))),
    }
