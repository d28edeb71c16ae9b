"""MDC, DeepCluster (Caron et al., ECCV 2018) made dense: every pixel is classified into the clusters of its epoch.

The baseline of PiCIE (CVPR 2021), whose code it follows: one view, and a classifier that is made anew with the clusters
and trained by an optimiser of its own. `method.weights=uniform` samples cells evenly over the clusters, as DeepCluster
samples pictures.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common import chance, distributed
from lightning_modules.base import Loss
from lightning_modules.clustered.rounds import ClusterRounds
from losses import clusters
from losses.clusters import Targets
from models.backbone import Features
from retrieval.minibatch import Clusters

DEVIATION = 0.01
"""Of the weights of a new classifier."""


class MDC(ClusterRounds):
    """The weighted cross-entropy of one view; `method.classifier=nonparametric` takes the centroids as classifier."""

    title = "MDC"
    clustered = ("view1",)
    fresh_split = "val"

    def build(self) -> None:
        super().build()
        self.parametric = self.cfg.method.classifier == "parametric"
        if self.parametric:
            self.weight = nn.Parameter(torch.zeros(self.cfg.method.num_clusters, self.code_dim))
            self.bias = nn.Parameter(torch.zeros(self.cfg.method.num_clusters))

    @property
    def classifier_names(self) -> Sequence[str]:
        return ("classifier",)

    def param_groups(self) -> list[dict[str, Any]]:
        own = [{"name": "classifier", "params": [self.weight, self.bias]}] if self.parametric else []
        return [*super().param_groups(), *own]

    def on_round(self, number: int, found: list[list[Clusters]]) -> None:
        """A new classifier, whose optimiser begins anew too; the network's goes on."""
        if not self.parametric:
            return
        self.weight.copy_(new_weight(tuple(self.weight.shape), self.cfg.seed, number))
        self.bias.zero_()
        state = self.optimizers().optimizer.state
        for parameter in (self.weight, self.bias):
            state.pop(parameter, None)

    def classifier_logits(self, codes: Tensor, view: int) -> Tensor:
        if not self.parametric:
            return super().classifier_logits(codes, view)
        return clusters.logits(codes, self.weight, self.bias)

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        (name,) = self.clustered
        codes = self.codes_of(views, name)
        ((target,),) = self.targets(views)
        logits = self.classifier_logits(codes, 0)
        if self.cfg.method.weights == "uniform":
            logits, target = self._sampled(logits, target)
        total = clusters.weighted_cross_entropy(logits, target.labels, target.weight)
        return Loss(total, {"used": self.used([target])}, codes=codes.detach(), view=name)

    def _sampled(self, logits: Tensor, target: Targets) -> tuple[Tensor, Targets]:
        """Cells of this rank's pictures, drawn evenly over its clusters, as one map [1,K,1,N]."""
        draws = chance.generator(self.cfg.seed, "mdc.uniform", self.global_step, distributed.rank())
        rows = clusters.sampled_evenly(target.labels, draws)
        chosen = logits.transpose(0, 1).flatten(1)[:, rows]
        labels = target.labels.flatten()[rows]
        return chosen[None, :, None], Targets(target.centroids, labels[None, None], target.weight)


def new_weight(shape: tuple[int, int], seed: int, number: int) -> Tensor:
    """The weights [K,D] of the classifier of round `number`."""
    return DEVIATION * torch.randn(shape, generator=chance.generator(seed, "mdc.classifier", number))
