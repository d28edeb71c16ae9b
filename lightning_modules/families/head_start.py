"""Where the head of a method begins (`method.head_start`): with random weights, or where it loses least.

A random projection to fewer channels loses part of what k-means finds in the features before the first step, and a
short run on few pictures does not bring it back. The first principal directions keep most of the features' variance.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from grouping.principal import Moments
from lightning_modules.base import UnsupervisedSegmenter

LOOKED = 256
"""Training pictures whose features are looked at."""


@torch.no_grad()
def begin(
    method: UnsupervisedSegmenter,
    loader: Callable[..., Any],
    features: Callable[[dict[str, Any]], Tensor] | None = None,
) -> bool:
    """Let `method.head` begin as `method.head_start` says. `random`: as it is. `principal`: its codes are then the
    features less their mean, along their first D principal directions; the non-linear term begins at 0, as do channels
    of codes beyond those of the features.

    loader: `unlabelled_loader` of the method; features: of one of its batches, maps [B,C,h,w], None: the backbone's.
    Says whether the weights are others now, so that copies have to follow.
    """
    if method.cfg.method.head_start == "random":
        return False
    head = method.head

    def frozen(batch: dict[str, Any]) -> Tensor:
        return method.frozen_features("train", batch).concat()

    weight, bias = principal(loader, features or frozen, head.in_dim, head.dim, head.linear.weight.device)
    last = [head.linear, *([head.nonlinear[2]] if head.nonlinear is not None else [])]
    for layer in last:
        layer.weight.zero_()
        layer.bias.zero_()
    head.linear.weight[: len(weight), :, 0, 0] = weight
    head.linear.bias[: len(bias)] = bias
    return True


@torch.no_grad()
def principal(
    loader: Callable[..., Any], features: Callable[[dict[str, Any]], Tensor], width: int, dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weight [D,C] and bias [D], float32, of the linear map to features less their mean along their first principal
    directions; D: `dim`, at most `width`, the channels C. Sees `LOOKED` training pictures. A collective."""
    moments = Moments.none(width, device)
    for batch in loader("train", "train", order="shuffled", limit=LOOKED, purpose="head.start"):
        moments = moments + Moments.of(features(batch).transpose(0, 1).flatten(1).T)
    moments = moments.of_all_ranks()
    directions = moments.directions(min(dim, width))
    return directions.float(), -(directions @ (moments.sum / moments.count)).float()
