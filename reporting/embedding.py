"""Codes as points of a plane, to look at."""

import importlib.util

import numpy as np
import torch
from torch import Tensor

from common import chance
from common.errors import ConfigError


def choose(wanted: str) -> str:
    """`explain.embedding` with `auto` resolved: umap where the package is installed, else pca. Raises ConfigError."""
    there = importlib.util.find_spec("umap") is not None
    if wanted == "umap" and not there:
        raise ConfigError(
            "explain.embedding=umap: the package umap-learn is not installed; install it, or set explain.embedding=pca"
        )
    return ("umap" if there else "pca") if wanted == "auto" else wanted


def embed(codes: Tensor, how: str, seed: int) -> tuple[np.ndarray, tuple[str, str]]:
    """Unit codes [n,D] -> points float64 [n,2], and what the two axes are. `how`: pca or umap."""
    if how == "umap":
        import umap

        reducer = umap.UMAP(
            n_components=2, metric="cosine", n_jobs=1, random_state=chance.key(seed, "explain.umap") % 2**32
        )
        return np.asarray(reducer.fit_transform(codes.cpu().numpy()), dtype=np.float64), ("UMAP 1", "UMAP 2")
    points, shares = principal(codes)
    return points.cpu().numpy(), tuple(
        f"component {i + 1} ({100 * part:.0f} % of the variance)" for i, part in enumerate(shares)
    )


def principal(rows: Tensor) -> tuple[Tensor, list[float]]:
    """The two principal components of rows [n,D], n >= 1: float64 [n,2], and the share of the variance of each.

    Exact, by the eigenvectors of the covariance; the largest entry of each is positive, so that none is mirrored from
    one machine to another. Where D is 1 the second is 0.
    """
    centred = rows.double() - rows.double().mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors.flip(1)[:, :2]
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    points = centred @ axes
    shares = (values.flip(0)[:2] / values.sum().clamp(min=1e-12)).tolist()
    missing = 2 - points.shape[1]
    return torch.nn.functional.pad(points, (0, missing)), shares + [0.0] * missing
