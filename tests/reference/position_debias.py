"""Adapters for the saved cases of position debiasing: the blank basis of INSID3 and the planes of RASA."""

import math

import numpy as np
from torch import Tensor

from models.debias import removal
from tests.reference import training as replay

Case = dict[str, np.ndarray]


def _array(value: Tensor) -> np.ndarray:
    return value.detach().numpy()


def blank_basis(case: Case) -> Case:
    basis = removal.blank_basis(replay.tensor(case["in_blank_features"]), int(case["cfg_components"]))
    return {
        "out_projector": _array(basis @ basis.T),
        "out_features": _array(removal.without(replay.tensor(case["in_features"]), basis)),
    }


def rasa(case: Case) -> Case:
    patches = replay.tensor(case["in_x"]).requires_grad_()
    planes, predictor = replay.tensor(case["in_planes"]), replay.tensor(case["in_predictor"])
    side = math.isqrt(patches.shape[1])
    finished = removal.without_planes(patches, planes)
    pairs = [*planes, *([predictor] if case["cfg_use_predictor"] else [])]
    before = removal.without_planes(patches, pairs[:-1])
    last = removal.on_plane(before, pairs[-1]) if pairs else patches * 0
    left = before - last
    left.square().sum().backward()
    return {
        "out_x": _array(left),
        "out_last_position_part": _array(last),
        "out_grad_x_of_sum_of_squares": _array(patches.grad),
        "out_position_loss": _array(removal.position_loss(finished, predictor, removal.coordinates(side, side))),
    }
