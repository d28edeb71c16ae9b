"""Adapters for `segsort.*`: pixel sorting, vMF losses and retrieval of SegSort, as in both releases."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import sliding
from evaluation.metrics import SegmentationScore
from grouping import segments
from losses.vmf import vmf, vmf_nca
from retrieval import voting

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(array))
    return tensor if tensor.is_floating_point() else tensor.long()


def _size(array: np.ndarray) -> tuple[int, int]:
    return int(array[0]), int(array[1])


def _arrays(results: dict[str, Tensor]) -> Case:
    return {name: value.detach().numpy() for name, value in results.items()}


def spherical_kmeans(case: Case) -> Case:
    vectors, start = _tensor(case["in_embeddings"]), _tensor(case["in_initial_labels"])
    count = int(case["cfg_max_label"])
    labels = segments.spherical_kmeans(
        vectors[None], start[None], count, int(case["cfg_iterations"]), empty="zero"
    ).squeeze(0)
    centres = segments.prototypes(vectors, labels, count)
    return _arrays({"out_labels": labels, "out_centres_of_out_labels": centres})


def calculate_prototypes(case: Case) -> Case:
    vectors = _tensor(case["in_embeddings"]).requires_grad_()
    found = segments.prototypes(vectors, _tensor(case["in_labels"]), int(case["cfg_max_label"]))
    (found * _tensor(case["in_grad_out"])).sum().backward()
    return _arrays({"out_prototypes": found, "out_grad_embeddings": vectors.grad})


def segment_mean(case: Case) -> Case:
    ids = _tensor(case["in_index"])
    return _arrays({"out_mean": segments.segment_means(_tensor(case["in_x"]), ids, int(ids.max()) + 1)})


def grid_labels(case: Case, rule: str = "linspace") -> Case:
    cells = _size(case["cfg_num_clusters"])
    return _arrays({"out_labels": segments.grid_labels(_size(case["cfg_size"]), cells, rule, dense=False)})


def grid_labels_tf(case: Case) -> Case:
    return grid_labels(case, "ceil")


def location_features(case: Case) -> Case:
    size = _size(case["cfg_size"])
    results = {
        "out_int": segments.coordinates(size),
        "out_float": segments.locations(size, "linspace"),
        "out_centred": segments.locations(size, "centred").expand(2, -1, -1, -1),
    }
    return _arrays(results)


def location_features_tf(case: Case) -> Case:
    size = _size(case["cfg_size"])
    results = {
        "out_int": segments.coordinates(size),
        "out_float": segments.locations(size, "relative"),
        "out_linspace": segments.locations(size, "linspace")[None],
    }
    return _arrays(results)


def segment_by_kmeans(case: Case) -> Case:
    labelled = bool(case["cfg_has_labels"])
    labels = _tensor(case["in_labels"]) if labelled else None
    found = segments.sort_pixels(
        _tensor(case["in_embeddings"]),
        _size(case["cfg_num_clusters"]),
        int(case["cfg_iterations"]),
        regions=labels,
        valid=labels != int(case["cfg_ignore_index"]) if labelled else None,
        empty="zero",
    )
    inside = found.ids >= 0
    picture = torch.arange(len(inside))[:, None].expand_as(inside)
    # Without labels the release has one label for all pixels.
    kept = labels.flatten(1)[inside] if labelled else torch.zeros(int(inside.sum()), dtype=torch.int64)
    results = {
        "out_embeddings": found.unit[inside],
        "out_embeddings_with_loc": found.located[inside],
        "out_labels": kept,
        "out_cluster_indices": found.ids[inside],
        "out_batch_indices": picture[inside],
    }
    return _arrays(results)


def prepare_prototype_labels(case: Case, order: str = "key") -> Case:
    offset = int(case["cfg_offset"])
    keys = _tensor(case["in_semantic"]) + _tensor(case["in_instance"]) * offset
    ids, count = segments.relabel(keys[None], order=order)
    labels = segments.segment_values(keys % offset, ids[0], int(count))
    return _arrays({"out_unique_instance": ids[0], "out_prototype_labels": labels})


def prepare_prototype_labels_tf(case: Case) -> Case:
    return prepare_prototype_labels(case, "appearance")


def majority_label(case: Case) -> Case:
    labels, ids = _tensor(case["in_semantic"]), _tensor(case["in_cluster"])
    majority = segments.majority_labels(labels, ids, int(ids.max()) + 1, int(labels.max()) + 1)
    return _arrays({"out_majority": majority, "out_selected_pixels": (labels == majority[ids]).nonzero()})


def segsort_loss(case: Case) -> Case:
    """The mean, every pixel's loss, and the gradient with and without the path through the prototypes."""
    own, classes = _tensor(case["in_instance_labels"]), _tensor(case["in_semantic_labels"])
    count = int(own.max()) + 1
    labels = segments.segment_values(classes, own, count)
    memory = _tensor(case["in_memory_prototypes"]), _tensor(case["in_memory_labels"])
    settings = {"memory": memory, "nca": bool(case["cfg_nca"])}
    kappa = float(case["cfg_concentration"])
    grads = []
    for fixed in (False, True):
        pixels = _tensor(case["in_embeddings"]).requires_grad_()
        bank = segments.prototypes(pixels, own, count)
        loss = vmf_nca(pixels, bank.detach() if fixed else bank, labels, own, kappa, **settings)
        loss.backward()
        grads.append(pixels.grad)
    results = {
        "out_loss": loss,
        "out_loss_per_pixel": vmf_nca(pixels, bank, labels, own, kappa, reduction="none", **settings),
        "out_grad_embeddings": grads[0],
        "out_grad_embeddings_fixed_prototypes": grads[1],
        "mid_prototypes": bank,
        "mid_prototype_labels": labels,
    }
    return _arrays(results)


def vmf_unsupervised_tf(case: Case) -> Case:
    raw = _tensor(case["in_embeddings"]).requires_grad_()
    pixels = F.normalize(raw.flatten(1, 2), dim=2)
    ids = segments.chained(*segments.relabel(_tensor(case["in_segment_ids"]).flatten(1))).flatten()
    rows = pixels.flatten(0, 1)
    loss = vmf(rows, segments.prototypes(rows, ids, int(ids.max()) + 1), ids, float(case["cfg_concentration"]))
    loss.backward()
    return _arrays({"out_loss": loss, "out_grad_embeddings": raw.grad})


def vmf_nca_supervised_tf(case: Case) -> Case:
    raw = _tensor(case["in_embeddings"]).requires_grad_()
    pixels = F.normalize(raw.flatten(1, 2), dim=2)
    semantic, grid = (_tensor(case[name]).flatten(1) for name in ("in_semantic", "in_grid_labels"))
    clusters = segments.spherical_kmeans(
        segments.located(pixels, _tensor(case["in_location"]).flatten(1, 2)),
        grid,
        max(int(case["cfg_num_clusters"]) ** 2, int(grid.max()) + 1),
        int(case["cfg_iterations"]),
        valid=semantic != int(case["cfg_ignore"]),
    )
    ids = segments.chained(*segments.segment_ids(clusters, semantic)).flatten()
    rows, count = pixels.flatten(0, 1), int(ids.max()) + 1
    labels = segments.segment_values(semantic.flatten(), ids, count)
    loss = vmf_nca(rows, segments.prototypes(rows, ids, count), labels, ids, float(case["cfg_concentration"]))
    loss.backward()
    return _arrays({"out_loss": loss, "out_grad_embeddings": raw.grad})


def vmf_memory_tf(case: Case) -> Case:
    pixels = _tensor(case["in_embeddings"]).requires_grad_()
    own, labels = _tensor(case["in_segment_index"]), _tensor(case["in_prototype_labels"])
    bank = segments.prototypes(pixels, own, len(labels))
    memory = _tensor(case["in_memory_raw"]), _tensor(case["in_memory_labels"])
    loss = vmf_nca(pixels, bank, labels, own, float(case["cfg_concentration"]), memory=memory)
    loss.backward()
    order = _tensor(case["in_permutation"])
    results = {
        "out_loss": loss,
        "out_grad_embeddings": pixels.grad,
        "out_new_memory": bank[order],
        "out_new_memory_labels": labels[order],
    }
    return _arrays(results)


def topk_retrieval(case: Case) -> Case:
    queries, bank = _tensor(case["in_query"]), _tensor(case["in_bank"])
    labels, own = _tensor(case["in_bank_labels"]), _tensor(case["in_query_labels"])
    found = voting.nearest_labels(queries, bank, labels, int(case["cfg_top_k"]))
    results = {
        "out_topk_labels": found,
        "out_majority": voting.vote(found, int(labels.max()) + 1),
        "out_accuracy": voting.agreement(found, own),
    }
    return _arrays(results)


def predict_by_retrieval(case: Case) -> Case:
    ids, labels = _tensor(case["in_cluster_index"]), _tensor(case["in_bank_labels"])
    queries = segments.prototypes(_tensor(case["in_pixel_embeddings"]), ids, int(ids.max()) + 1)
    found = voting.nearest_labels(queries, _tensor(case["in_bank"]), labels, int(case["cfg_top_k"]))
    voted = voting.vote(found, int(labels.max()) + 1)
    return _arrays({"out_pixel_labels": voted[ids], "out_pixel_topk_labels": found[ids]})


def knn_predict_tf(case: Case) -> Case:
    queries, labels = _tensor(case["in_test_prototypes"]), _tensor(case["in_bank_labels"])
    found = voting.nearest_labels(queries, _tensor(case["in_bank"]), labels, int(case["cfg_k"]))
    voted = voting.vote(found, int(labels.max()) + 1)
    return _arrays({"out_pixel_labels": voted[_tensor(case["in_cluster_labels"])]})


def extract_prototypes_tf(case: Case) -> Case:
    pixels, semantic = _tensor(case["in_embeddings"]), _tensor(case["in_semantic"])
    clusters = segments.spherical_kmeans(
        segments.located(pixels[None], _tensor(case["in_location"])),
        _tensor(case["in_grid_labels"])[None],
        int(case["cfg_num_clusters_total"]),
        int(case["cfg_iterations"]),
        valid=(semantic != int(case["cfg_ignore"]))[None],
    )
    ids, count = segments.relabel(clusters, clusters >= 0, order="appearance")
    majority = segments.majority_labels(semantic, ids[0], int(count), int(case["cfg_ignore"]))
    chosen = ids[0].where(semantic == segments.take(majority, ids[0], -1), -1)
    return _arrays({"out_prototypes": segments.prototypes(pixels, chosen, int(count)), "out_labels": majority})


def iou(case: Case) -> Case:
    classes = int(case["cfg_num_classes"])
    score = SegmentationScore(classes, classes, matching="identity", absent="zero")
    score.update(_tensor(case["in_pred"])[None], _tensor(case["in_target"])[None])
    found, counts = score.compute(), score.counts.numpy()
    results = {
        "out_tp_fn": counts.sum(0),
        "out_tp_fp": counts.sum(1),
        "out_tp": counts.diagonal(),
        "out_iou_percent": found.iou,
        "out_miou_percent": np.array(found.miou),
        "out_pixel_acc": np.array(found.acc / 100),
    }
    return results


def window_ends(case: Case) -> Case:
    settings = (int(case[f"cfg_{name}"]) for name in ("padded", "crop", "stride"))
    return {"out_ends": np.array(sliding.window_ends(*settings))}
