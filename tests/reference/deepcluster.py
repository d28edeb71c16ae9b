"""Adapter for `deepcluster.*`: the whitening of features before k-means."""

import numpy as np
import torch

from retrieval.whitening import principal, whitened

Case = dict[str, np.ndarray]


def preprocess_features(case: Case) -> Case:
    features = torch.from_numpy(np.array(case["in_features"]))
    rows = whitened(features, *principal(features, int(case["cfg_dim"])))
    return {"out_gram": (rows @ rows.T).numpy()}
