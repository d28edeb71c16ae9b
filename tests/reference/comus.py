"""Adapters for `comus.*`: salience to masks, spectral clusters of objects, their cores and the score of COMUS."""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from evaluation import matching
from grouping import neighbours, salience

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def saliency_to_mask(case: Case) -> Case:
    maps, threshold = _tensor(case["in_prob"]), float(case["cfg_threshold"])
    sizes, clusters = case["in_image_hw"], case["in_cluster"]
    together, alone = (salience.salient(maps, threshold, norm) for norm in ("batch", "image"))
    painted = np.full((len(maps), *sizes.max(0)), 255, np.uint8)
    found = []
    for row, (mask, (height, width)) in enumerate(zip(together, sizes.tolist(), strict=True)):
        own = salience.at_size(mask, (height, width))
        found.append(salience.object_box(own, int(case["cfg_min_size"])))
        painted[row, :height, :width] = np.where(own.numpy(), clusters[row] + 1, 0)
    areas, kept, boxes = zip(*found, strict=True)
    return {
        "out_mask_batch_norm": together.numpy(),
        "out_mask_image_norm": alone.numpy(),
        "out_area": np.array(areas),
        "out_keep": np.array(kept),
        "out_box_x0y0x1y1": torch.stack(boxes).numpy(),
        "out_pseudo_mask_padded255": painted,
    }


def spectral_clustering(case: Case) -> Case:
    """Coordinates and clusters are as many as the case has, which may differ."""
    graph = neighbours.neighbour_graph(_tensor(case["in_features"]), int(case["cfg_num_neighbors"]))
    found = neighbours.spectral_clusters(
        graph, int(case["cfg_num_clusters"]), core=float(case["cfg_core_percent"]), seed=0,
        coordinates=int(case["cfg_num_components"]),
    )  # fmt: skip
    return {
        "out_affinity": (2 * sparse.csr_matrix(graph).toarray()).astype(np.uint8),
        "out_eigenvalues": found.embedding.values.numpy(),
        "out_maps": found.embedding.maps.numpy(),
        "out_centers": found.centres.numpy(),
        "out_labels": found.labels.numpy(),
        "out_cosine_distance": found.distance.numpy(),
        "out_is_core": found.core.numpy(),
    }


def core_samples(case: Case) -> Case:
    parts = (_tensor(case[f"in_{name}"]) for name in ("maps", "centers", "labels"))
    distance, core = neighbours.core_objects(*parts, float(case["cfg_core_percent"]))
    return {"out_cosine_distance": distance.numpy(), "out_is_core": core.numpy()}


def match_and_miou(case: Case) -> Case:
    clusters, classes = (int(case[f"cfg_num_{name}_with_bg"]) for name in ("clusters", "classes"))
    known = case["in_target"] != int(case["cfg_ignore"])
    counts = np.zeros((clusters, classes), np.int64)
    np.add.at(counts, (case["in_pred"][known], case["in_target"][known]), 1)
    scores = matching.score(
        counts, "hungarian_iou" if clusters == classes else "many_to_one_iou", "drop", absent="zero"
    )
    return {
        "out_iou_matrix": matching.iou_matrix(counts),
        "out_match": np.stack([np.arange(clusters), scores.mapping], axis=1),
        "out_per_class_iou": scores.iou / 100,
        "out_miou": np.array(scores.miou / 100),
        "out_pixel_accuracy": np.array(scores.acc / 100),
    }
