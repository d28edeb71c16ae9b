"""Adapters for `leopart.*`: the training step of Leopart and its pieces, and the read-outs of its evaluation."""

import numpy as np
import torch
from torch import Tensor

from evaluation import matching
from evaluation.overclustering import foreground, graph
from grouping.attention_masks import attention_foreground as foreground_of
from lightning_modules.base.optim import cosine
from lightning_modules.representations.crops import cut, shared_boxes
from lightning_modules.representations.leopart import aligned_loss
from losses.self_distillation import sinkhorn_targets
from tests.reference import leopart_training
from tests.reference.training import tensor

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
    weights, sigma = tensor(case["in_attention_headmean"])[:, 0], float(case["cfg_blur_sigma"])
    rules = {"sigma": sigma, "kernel": int(case["cfg_blur_kernel"])}
    found = {name: foreground_of(weights, mass, **rules) for name, mass in (("06", 0.6), ("065", 0.65))}
    return {f"out_mask_thr{name}": mask[:, None].numpy() for name, mask in found.items()}


def cosine_schedule(case: Case) -> Case:
    total = int(case["cfg_epochs"]) * int(case["cfg_iters_per_epoch"])
    ends = float(case["cfg_base"]), float(case["cfg_final"])
    return {"out_schedule": np.array([cosine(*ends, step, total) for step in range(total)])}


def crop_boxes(case: Case) -> Case:
    numbers = case["cfg_nmb_crops"].tolist()
    sides = [side for side, count in zip(case["cfg_size_crops"].tolist(), numbers, strict=True) for _ in range(count)]
    sizes = torch.tensor([(float(side), float(side)) for side in sides])
    found = shared_boxes(tensor(case["in_crop_boxes_xyxy"])[None], sizes)[0]
    return {"out_gc_boxes": found[: numbers[0]].numpy(), "out_all_boxes": found[:, : numbers[0]].numpy()}


def sinkhorn(case: Case) -> Case:
    logits, epsilon = tensor(case["in_logits"]), float(case["cfg_epsilon"])
    return {f"out_assignments_iters{n}": sinkhorn_targets(logits, epsilon, n).numpy() for n in (1, 3, 10)}


def loss(case: Case) -> Case:
    batch, (large, small), size = int(case["cfg_batch_size"]), case["cfg_nmb_crops"].tolist(), int(case["cfg_roi_size"])
    grids = [int(case["cfg_global_grid"])] * large + [int(case["cfg_local_grid"])] * small
    patch, temperature = int(case["cfg_patch_size"]), float(case["cfg_temperature"])
    cells = torch.zeros(batch, large + small, large + small, 4)
    cells[:, :large] = tensor(case["in_gc_boxes"]) / patch
    cells[:, :, :large] = tensor(case["in_all_boxes"]) / patch

    def maps(rows: Tensor, grid: int) -> Tensor:
        return rows.unflatten(0, (batch, grid, grid)).movedim(-1, 1)

    rules = float(case["cfg_epsilon"]), int(case["cfg_sinkhorn_iterations"])
    crops = [sinkhorn_targets(rows, *rules) for rows in tensor(case["in_teacher_logits"]).chunk(large)]
    targets = torch.stack([maps(rows, grids[0]) for rows in crops])
    masks = tensor(case["in_foreground_mask"]).squeeze(1).unflatten(0, (large, batch)) > 0
    cuts = [cut(part, cells[:, 0], size).flatten(0, 1) for part in (targets[0], masks[0][:, None].float())]
    names = ("mid_assign_crop0", "mid_aligned_assign_crop0", "mid_aligned_mask_crop0")
    found = {name: part.numpy() for name, part in zip(names, (crops[0], *cuts), strict=True)}
    for name, chosen in (("all", None), ("fg", masks)):
        rows = tensor(case["in_student_logits"]).requires_grad_()
        parts = rows.split([batch * grid**2 for grid in grids])
        logits = [maps(part, grid) for part, grid in zip(parts, grids, strict=True)]
        total, _ = aligned_loss(targets, logits, cells, size, temperature, chosen, tolerance=0.0, skipped="count")
        total.backward()
        found |= {f"out_loss_{name}": total.detach().numpy(), f"out_grad_student_logits_{name}": rows.grad.numpy()}
    return found


def miou_hungarian(case: Case) -> Case:
    classes = int(case["cfg_num_gt"])
    found = _scored(case, "in_gt", classes, "hungarian_iou")
    shown = np.arange(len(found.counts))
    unmatched = matching.class_histogram(found.counts, np.where(shown < classes, shown, matching.UNMATCHED))
    fewer = _scored(case, "in_gt4", int(case["in_gt4"].max()) + 1, "hungarian_iou")
    hits = np.diagonal(found.histogram)
    return {
        "out_miou": np.array(found.miou / 100),
        "out_tp": hits,
        "out_fp": found.histogram[:classes].sum(1) - hits,
        "out_fn": found.histogram.sum(0) - hits,
        "out_reordered": found.mapping[case["in_pred"]],
        "out_score_matrix_iou": matching.iou_matrix(found.counts).T,
        "out_miou_no_matching": np.nan_to_num(matching.jaccard(unmatched)).mean(),
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


training = leopart_training.run
