"""Consistency of a picture and its recoloured copy (HP, CVPR 2023)."""

import torch.nn.functional as F
from torch import Tensor

from common.precision import real


def consistency(z: Tensor, z_augmented: Tensor) -> Tensor:
    """Mean over patches of || z_i - z'_i + 1e-6 ||_2, for unit rows z, z' [N,D]; a scalar, gradient to both.

    The 1e-6 is added to every component, as torch's pairwise distance does; so equal pairs have a finite gradient.
    Computed in float32 (float64 for float64 rows): half precision does not add a 1e-6.
    """
    return F.pairwise_distance(real(z), real(z_augmented), p=2.0, eps=1e-6).mean()
