"""Adapters for `maskcut.*`: MaskCut's graphs, cuts, orientation and gates."""

import numpy as np
import torch
from torch import Tensor

from grouping import eigen, maskcut, spectral

Case = dict[str, np.ndarray]


def _square(case: Case) -> tuple[int, int]:
    return int(case["cfg_grid"]), int(case["cfg_grid"])


def forward(case: Case) -> Case:
    """As released: a rejected mask does not end the search."""
    size, count = _square(case), int(case["cfg_N"])
    tau, eps = float(case["cfg_tau"]), float(case["cfg_eps"])
    features = torch.from_numpy(case["in_feats"].T.copy())[None]
    cut = maskcut.mask_cut(features, size, count=count, tau=tau, eps=eps, on_reject="released", orient="released")
    affinity = spectral.threshold_affinity(features, tau, eps)
    edges = []
    for painting in cut.paintings[0]:
        maskcut.blank_affinity(affinity, painting.flatten()[None], eps)
        edges.append(affinity[0] == 1)
    final = cut.masks[0]
    for side in (1, 2):
        final = final.repeat_interleave(int(case["cfg_output_size"]) // size[0], side)
    results = {
        "out_painting": cut.paintings[0],
        "out_affinity_is_edge": torch.stack(edges),
        "out_eigenvectors": cut.vectors[0].flatten(1),
        "out_bipartitions": cut.foregrounds[0],
        "out_seeds": cut.seeds[0],
        "out_last_seed": cut.seeds[0, -1],
        "out_candidate_masks": cut.candidates[0],
        "out_iou_with_previous": cut.overlaps[0],
        "out_area_ratio": cut.areas[0],
        "out_accepted": cut.accepted[0],
        "out_final_masks": final,
    }
    return {name: value.numpy() for name, value in results.items()}


forward_reappearing_mask = forward


def orientation(case: Case) -> Case:
    """The released rule on v and -v of every pair."""
    vectors: Tensor = torch.from_numpy(case["in_eigenvectors"]).unflatten(1, _square(case))
    found = maskcut.halves(vectors, "released")
    results = {
        "out_fg_corners": found.corners,
        "out_reversed": found.turned,
        "out_seed": found.seeds,
        "out_foreground": found.foreground,
        "out_component": found.components,
        "out_pair_sign_dependent": (found.components[::2] != found.components[1::2]).flatten(1).any(1),
    }
    return {name: value.numpy() for name, value in results.items()}


def painting(case: Case) -> Case:
    painted = torch.from_numpy(case["in_painting"] | case["in_current_mask"])
    features = torch.from_numpy(case["in_feats"].T.copy())[None]
    tau, eps = float(case["cfg_tau"]), float(case["cfg_eps"])
    affinity = spectral.threshold_affinity(features.double(), tau, eps)
    maskcut.blank_affinity(affinity, painted.flatten()[None], eps)
    results = {
        "out_painting": painted,
        "out_feats_masked": maskcut.blank(features, painted.flatten()[None])[0].T,
        "out_affinity_is_edge": affinity[0] == 1,
        "out_degree": eigen.degrees(affinity)[0],
    }
    return {name: value.numpy() for name, value in results.items()}
