"""Adapters for `transfgu.*`: windows, concept maps, mask transformer, losses and scores of TransFGU."""

import numpy as np
import torch
from torch import Tensor

from evaluation.metrics import SegmentationScore
from grouping import concepts as maps
from grouping import segments, windows
from losses import concepts
from models.mask_decoder import MaskDecoder
from retrieval import kmeans

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _bootstrap(case: Case, things: bool) -> Case:
    logits = _tensor(case["in_logits"]).requires_grad_()
    taught = bool(case["cfg_has_teacher"])
    teacher = _tensor(case["in_teacher_logits"]) if taught else None
    soft, _, evidence = concepts.soft_labels(_tensor(case["in_pseudo_label"]), teacher, background=things)
    permutation = _tensor(case["in_negative_permutation"]) if taught else None
    alpha = concepts.negative_weight(int(case["cfg_epoch_since_reset"])) if taught else 0.0
    loss = concepts.bootstrapped(logits, soft, permutation, alpha)
    unsure = concepts.thing_uncertainty(logits, evidence) if things else concepts.uncertainty(logits)
    total = loss.mean() + 0.3 * unsure.mean()
    total.backward()
    results = {
        "out_labels": soft.argmax(1),
        "out_loss_cat": loss,
        "out_loss_uncertainty": unsure,
        "out_mean_loss_cat": loss.mean(),
        "out_mean_loss_uncertainty": unsure.mean(),
        "out_weighted_sum": total,
        "out_grad_logits": logits.grad,
    }
    return {name: value.detach().numpy() for name, value in results.items()}


def things_bootstrap_loss(case: Case) -> Case:
    return _bootstrap(case, things=True)


def thingstuff_bootstrap_loss(case: Case) -> Case:
    return _bootstrap(case, things=False)


def cls_emb_loss(case: Case) -> Case:
    rows = _tensor(case["in_cls_emb"]).requires_grad_()
    pairs = concepts.embedding_diversity(rows)
    pairs.mean().backward()
    results = {"out_loss_pairs": pairs, "out_loss_mean": pairs.mean(), "out_grad_cls_emb": rows.grad}
    return {name: value.detach().numpy() for name, value in results.items()}


def binarize_mask(case: Case) -> Case:
    return {"out_mask": maps.kept_mass(_tensor(case["in_values"]), float(case["cfg_keep_fraction"])).numpy()}


def concept_map(case: Case) -> Case:
    row, values = _tensor(case["in_attn"])[:, :, 0], _tensor(case["in_values"])
    gradient = maps.class_row_gradient(row, values, _tensor(case["in_centroids"]), lambda x: x, divisor=len(row))
    found = maps.concept_maps(row, gradient, float(case["cfg_keep_fraction"]))
    return {"out_maps": found.unflatten(2, (int(case["cfg_h"]), int(case["cfg_w"]))).numpy()}


def kmeans_centroids(case: Case) -> Case:
    """Centroids are plain means of their members, in lexicographic order."""
    points, count = _tensor(case["in_features"]), int(case["cfg_k"])
    settings = {"spherical": False, "seed": int(case["cfg_seed"]), "iterations": int(case["cfg_niter"])}
    found = kmeans.fit(points, count, **settings)
    labels = kmeans.assign(points, found.centroids, spherical=False)
    means = segments.segment_means(points, labels, count)
    order = np.lexsort(means.numpy().T[::-1])
    return {"out_centroids_sorted": means.numpy()[order], "out_labels_sorted": order.argsort()[labels.numpy()]}


def crop_boxes(case: Case) -> Case:
    boxes, counts = windows.crop_boxes(int(case["cfg_h"]), int(case["cfg_w"]), case["cfg_scales"].tolist())
    return {"out_boxes_y0x0y1x1_inclusive": boxes.numpy(), "out_count_per_scale": np.array(counts)}


def mask_decoder(case: Case) -> Case:
    weights = {name.removeprefix("w."): _tensor(value) for name, value in case.items() if name.startswith("w.")}
    dim, in_dim = weights["proj_dec.weight"].shape
    ratio = weights["blocks.0.mlp.fc1.weight"].shape[0] / dim
    settings = {"layers": int(case["cfg_layers"]), "heads": int(case["cfg_heads"]), "mlp_ratio": ratio}
    network = MaskDecoder(in_dim, weights["cls_emb"].shape[1], dim, **settings).eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        _, classes, masks = network(_tensor(case["in_patch_tokens"]))
    return {"out_masks": masks.numpy(), "out_cls_embeddings": classes.numpy()}


def hungarian_metric(case: Case) -> Case:
    """Ours has clusters in rows and orders scores by class."""
    count = int(case["cfg_n_class"])
    metric = SegmentationScore(count, count)
    metric.update(_tensor(case["in_preds"]), _tensor(case["in_labels"]))
    found = metric.compute()
    cluster_of = found.mapping.argsort()
    counts = found.counts.T
    recalls = np.diagonal(found.histogram) / np.maximum(found.histogram.sum(0), 1)
    recalls = np.where(found.histogram.sum(0) > 0, recalls, np.nan)
    return {
        "out_histogram": counts.astype(float),
        "out_match_gt": np.arange(count),
        "out_match_cluster": cluster_of,
        "out_histogram_reordered": counts[found.mapping].astype(float),
        "out_iou_by_cluster": found.iou[found.mapping],
        "out_mean_iou": np.array(found.miou),
        "out_pixel_accuracy": np.array(found.acc),
        "out_mean_class_accuracy": np.array(100 * np.nanmean(recalls)),
    }
