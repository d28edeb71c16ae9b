"""Adapter for the saved cases of ACSeg: its loss. There is no release; they come from a re-implementation."""

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from losses import modularity as losses
from tests.reference import training as replay

Case = dict[str, np.ndarray]


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def modularity_loss(case: Case) -> Case:
    features, concepts = replay.tensor(case["in_pixel_features"]), replay.tensor(case["in_concepts"]).requires_grad_()
    loss = losses.concept_modularity(features, concepts)
    loss.sum().backward()
    cosines = losses.cosines(F.normalize(features, dim=2), concepts)
    return {
        "out_cosine": _array(cosines),
        "out_hard_assignment": _array(cosines.argmax(2)),
        "out_loss_per_image": _array(loss),
        "out_grad_concepts_sum_of_losses": _array(concepts.grad),
    }
