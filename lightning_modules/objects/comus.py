"""COMUS (Zadaianchuk et al., ICLR 2023): objects of pictures, clustered by their neighbour graph and taught in rounds.

Offline, a mask of every picture (`method.masks.provider`; the release takes a salience network's) and a vector of every
object, the class token of its crop. Objects are nodes of a graph of nearest neighbours; k-means in its first
eigenvectors gives classes, and of each cluster the objects at its core are painted as pseudo-labels. A segmenter learns
them, relabels all training pictures, and a fresh one learns these (`phases`). Scored as val/own/*. Code:
zadaianchuk/comus.

Here, and not as released: one backbone for objects and segmenter, maps of salience are stretched picture by picture,
starts of k-means and of eigenvectors are keyed, clusters of a class are found anew in every validation.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from grouping import neighbours
from lightning_modules.objects.named import NamedObjects, object_rows
from pseudo_labels.steps import ReduceStep, Results


class Comus(NamedObjects):
    """Codes = what the segmenter's classifier reads."""

    title = "COMUS"

    def naming(self) -> ReduceStep:
        return SpectralNames(self.cfg, self.clusters)


class SpectralNames(ReduceStep):
    """Clusters of the objects' neighbour graph: `labels` int64 [n], `distance` float64 [n] (1 - cosine to the centre),
    `assignment` int64 [n] (the label of what is at a core, else -1), `eigenvalues` [K+1] and `components` [1]."""

    name, needs = "clusters", ("objects",)

    def __init__(self, cfg: Any, count: int) -> None:
        self.method, self.count, self.seed = cfg.method, count, int(cfg.seed)

    def settings(self) -> dict[str, Any]:
        return {"count": self.count, "seed": self.seed, "graph": dict(self.method.graph)} | dict(self.method.clusters)

    def table(self, results: Results, device: torch.device) -> dict[str, Tensor | np.ndarray]:
        own = self.method.clusters
        graph = neighbours.neighbour_graph(object_rows(results, self.count, device), self.method.graph.neighbours)
        found = neighbours.spectral_clusters(graph, self.count, core=own.core, seed=self.seed, restarts=own.restarts)
        return {
            "labels": found.labels,
            "distance": found.distance,
            "assignment": torch.where(found.core, found.labels, -1),
            "eigenvalues": found.embedding.values,
            "components": torch.tensor([found.embedding.components]),
        }
