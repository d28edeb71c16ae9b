"""Adapter for `tokencut.ncut`: TokenCut's graph, its cut and the box of the object."""

import numpy as np
import torch

from grouping import eigen, masks, spectral

Case = dict[str, np.ndarray]


def ncut(case: Case) -> Case:
    grid = int(case["cfg_h"]), int(case["cfg_w"])
    size = int(case["cfg_image_height"]), int(case["cfg_image_width"])
    features = torch.from_numpy(case["in_feats"])[None]
    tau, eps = float(case["cfg_tau"]), float(case["cfg_eps"])
    affinity = spectral.threshold_affinity(features, tau, eps, bool(case["cfg_binary_graph"]))
    cut = spectral.token_cut(affinity, grid)
    results = {
        "out_W": affinity[0],
        "out_D": eigen.degrees(affinity)[0],
        "out_eigenvalues_2_3": cut.values[0],
        "out_eigenvector": cut.vectors[0],
        "out_bipartition": cut.bipartition[0],
        "out_seed": cut.seeds[0],
        "out_components": masks.components(cut.bipartition[0], 4),
        "out_object_mask": cut.masks[0],
        "out_box_xyxy": masks.tight_box(cut.masks[0], int(case["cfg_patch_size"]), size),
    }
    return {name: value.numpy() for name, value in results.items()}
