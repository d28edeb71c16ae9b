"""Adapter for `backbones.*` cases: position embeddings resampled by the released rules."""

import numpy as np
import torch

from models.vit import positions

RULE_OF = {
    "out_dino_original": "dino",
    "out_dinov2_offset01_no_antialias": "dino",
    "out_dinov2_reg_size_antialias": "timm",
    "out_timm_1_0_31": "timm",
}


def pos_embed(case: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The embedding of a case on the grid of its picture, under every rule that the case names a result for."""
    base, patch = int(case["cfg_base_grid"]), int(case["cfg_patch_size"])
    grid = tuple(int(side) // patch for side in case["cfg_image_hw"])
    embedding = torch.from_numpy(case["in_pos_embed"])
    prefix = embedding.shape[1] - base * base
    return {
        name: positions.resample(embedding, (base, base), grid, prefix, rule).numpy() for name, rule in RULE_OF.items()
    }
