"""Global hidden positives of HP (CVPR 2023): the positives of a patch in its batch, and the contrastive loss over them.

An anchor's positives are the patches that are more similar to it than any entry of a reference pool is. The released
code keeps about seven N x N float matrices for the backward pass. Here the loss and its gradient are computed in closed
form, in one of two ways that agree to rounding: `dense` sweeps over all pairs of patches in blocks, `sparse` computes
the pairs alone that are positives or candidates. `loss` chooses by counted work.

Code: loss.py of hynnsk/HP. Rows of all [N,...] tensors are patches, picture by picture, `cells` a picture.
"""

from losses.contrastive.loss import CONTRASTS, ghp_contrastive, lambda_schedule, random_candidates
from losses.contrastive.plan import BASE_TEMPERATURE, DENOMINATORS, MIN_TEMPERATURE, VERSIONS
from losses.contrastive.positives import denominator_mask, positive_mask, thresholds

__all__ = [
    "BASE_TEMPERATURE",
    "CONTRASTS",
    "DENOMINATORS",
    "MIN_TEMPERATURE",
    "VERSIONS",
    "denominator_mask",
    "ghp_contrastive",
    "lambda_schedule",
    "positive_mask",
    "random_candidates",
    "thresholds",
]
