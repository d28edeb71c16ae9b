"""Adapter for `mdc.training`: two whole epochs of MDC, with the classifiers that its epochs began with."""

from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from lightning_modules.clustered import mdc
from tests.reference import clustered
from tests.reference import training as steps

Case = dict[str, np.ndarray]


def training(case: Case) -> Case:
    views = {"view1": steps.pictures(case["in_view"])}
    run = clustered.Followed(case, clustered.build(case, ["method=mdc"]), clustered.Pictures(case, views))

    def new_weight(shape: Any, seed: int, number: int) -> Tensor:
        return torch.from_numpy(case["in_classifier_weight"][number]).flatten(1)

    run.train(patch.object(mdc, "new_weight", new_weight))
    results = {name: _without_views(name, value) for name, value in run.results.items()}
    shape = case["in_classifier_weight"].shape[1:]
    results["out_grad0_classifier_weight"] = run.gradients["weight"].reshape(shape).numpy()
    results["out_grad0_classifier_bias"] = run.gradients["bias"].numpy()
    weights, biases = (np.stack([state[name].numpy() for state in run.states]) for name in ("weight", "bias"))
    results["out_after_classifier_weight"] = weights.reshape(-1, *shape)
    results["out_after_classifier_bias"] = biases
    return results | {"out_loss": run.steps.logged["loss"]}


def _without_views(name: str, value: np.ndarray) -> np.ndarray:
    """There is one view, and the case has no axis for it."""
    epochs = "out_first_centroids", "out_centroids", "out_kmeans_loss", "out_labels", "out_weight", "out_scores"
    return value[:, 0] if name in epochs else value
