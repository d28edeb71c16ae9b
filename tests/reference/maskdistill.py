"""Adapters for `maskdistill.*`: attention masks, whitened crops, confident masks and hard pixels of MaskDistill."""

import numpy as np
import torch
from torch import Tensor

from evaluation import matching
from grouping import attention_masks
from losses.objects.hard_pixels import hard_pixel_loss
from pseudo_labels import views
from retrieval import whitening

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def attention_mask(case: Case) -> Case:
    queries, keys = _tensor(case["in_q"]), _tensor(case["in_k"])
    size, heads = (int(case["cfg_h"]), int(case["cfg_w"])), range(int(case["cfg_heads"]))
    scores = attention_masks.class_scores(queries, keys, heads=heads)
    found = attention_masks.attention_masks(
        scores, keys[:, :, 1:].transpose(1, 2).flatten(2), size,
        topk=float(case["cfg_topk"]), mass=float(case["cfg_mass"]), topk_policy="released",
    )  # fmt: skip
    chosen = found.chosen[0]
    results = {
        "out_cls_scores": scores[0],
        "out_keep_mass": found.kept[0],
        "out_num_selected": torch.tensor(len(chosen)),
        "out_num_positive_scores": ((scores * found.kept)[0, chosen] > 0).sum(),
        "out_selected_ids": chosen,
        "out_source": found.sources[0],
        "out_patch_graph_row_source": found.seeds[0],
        "out_object_mask": found.masks[0],
    }
    return {name: value.numpy() for name, value in results.items()}


def confident_selection(case: Case) -> Case:
    """Every picture by itself, as the view of its record paints it."""
    pictures, scores = case["in_image_index"], case["in_scores"]
    kept, maps = [], {"intended": [], "released": []}
    for picture in range(int(pictures.max()) + 1):
        rows = np.flatnonzero(pictures == picture)
        sure = rows[views.confident(scores[rows], float(case["cfg_threshold"]))]
        kept.append(sure)
        for name, overlap in (("intended", "skip"), ("released", "released")):
            maps[name].append(views.paint(case["in_masks"][sure], case["in_category"][sure], overlap))
    found = {f"out_label_map_{name}": np.stack(own) for name, own in maps.items()}
    return found | {"out_kept": np.concatenate(kept)}


def ohem(case: Case) -> Case:
    logits = _tensor(case["in_logits"]).requires_grad_()
    loss, count = hard_pixel_loss(logits, _tensor(case["in_target"]), float(case["cfg_threshold"]))
    loss.backward()
    return {"out_loss": loss.detach().numpy(), "out_grad_logits": logits.grad.numpy(), "out_num_hard": count.numpy()}


def cluster_prep_and_match(case: Case) -> Case:
    points = _tensor(case["in_features"])
    clusters, labels, count = case["in_cluster_ids"], case["in_labels"], int(case["cfg_num_clusters"])
    counts = np.zeros((count, max(count, int(labels.max()) + 1)), np.int64)
    np.add.at(counts, (clusters, labels), 1)
    votes = []
    for name in np.unique(clusters):  # of equal counts the class seen first stands first, and the first of equals wins
        seen = list(dict.fromkeys(labels[clusters == name].tolist()))
        votes.append((name, seen[matching.match(counts[name : name + 1, seen], "many_to_one")[0]]))
    return {
        "out_whitened_normalised": whitening.scaled(points, whitening.deviations(points)).numpy(),
        "out_hungarian_match": np.stack([np.arange(count), matching.match(counts, "hungarian")], axis=1),
        "out_majority_match": np.array(votes),
    }
