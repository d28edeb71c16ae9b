"""Adapters for `deep_spectral.*`: affinities, eigenvectors, regions and boxes of Deep Spectral Methods."""

import numpy as np
import torch
from torch import Tensor

from grouping import eigen, masks, spectral

Case = dict[str, np.ndarray]


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))


def _arrays(results: dict[str, Tensor]) -> Case:
    return {name: value.numpy() for name, value in results.items()}


def laplacian_eigs(case: Case) -> Case:
    """Features alone, or with the colour graph where its weight is not zero."""
    size = int(case["cfg_h_patch"]), int(case["cfg_w_patch"])
    patch, factor = int(case["cfg_patch_size"]), int(case["cfg_downsample_factor"])
    normalize, weight = bool(case["cfg_normalize"]), float(case["cfg_image_color_lambda"])
    rows = _tensor(case["in_feats"])[None]
    if factor != patch:
        maps = rows.mT.unflatten(2, size)
        size = tuple(side * patch // factor for side in size)
        rows = (spectral.upsampled(maps, size, unit=normalize)).flatten(2).mT
        normalize = False
    affinity = spectral.feature_affinity(rows, normalize=normalize, nonnegative=bool(case["cfg_threshold_at_zero"]))
    results = {}
    if "in_image_lr" in case:
        picture = _tensor(case["in_image_lr"]).permute(2, 0, 1)[None] / 255
        colour = spectral.colour_affinity(picture)
        results["out_W_color"] = colour[0]
        affinity = affinity + weight * colour
    lapnorm = bool(case["cfg_lapnorm"])
    found = eigen.smallest(affinity, int(case["cfg_K"]), normalized=lapnorm, nearest="modulus")
    results |= {
        "out_W": affinity[0],
        "out_D": eigen.degrees(affinity)[0],
        "out_eigenvalues": found.values[0],
        "out_eigenvectors": found.vectors[0],
    }
    return _arrays(results)


color_eigs = laplacian_eigs


def multi_region_bg_and_boxes(case: Case) -> Case:
    labels, patch = _tensor(case["in_cluster_labels"]), int(case["cfg_patch_size"])
    adaptive = bool(case["cfg_adaptive"])
    count = spectral.adaptive_count(_tensor(case["in_eigenvalues"])) if adaptive else int(case["cfg_fixed_segments"])
    names, shares = masks.border_shares(labels)
    regions = masks.background_first(labels)
    segments, small = masks.region_boxes(regions, erode=2, dilate=3)
    large = masks.region_boxes(regions, erode=2, dilate=5)[1]
    results = {
        "out_n_clusters_used": torch.tensor(count),
        "out_border_indices": names,
        "out_border_fraction": shares,
        "out_segmap": regions,
        "out_segment_indices": segments,
        "out_bboxes_erode2_dilate3": small,
        "out_bboxes_erode2_dilate5": large,
        "out_bboxes_pixels_erode2_dilate5": large * patch,
    }
    return _arrays(results)


def localisation_box(case: Case) -> Case:
    patch = int(case["cfg_patch_size"])
    size = int(case["cfg_image_height"]), int(case["cfg_image_width"])
    vector = _tensor(case["in_eigenvector"]).view(size[0] // patch, size[1] // patch)
    return _arrays({"out_box_xyxy": spectral.localise(vector, patch, size)[1]})
