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
    width, weight = head.in_dim, head.linear.weight
    moments = Moments.none(width, weight.device)
    for batch in loader("train", "train", order="shuffled", limit=LOOKED, purpose="head.start"):
        maps = method.frozen_features("train", batch).concat() if features is None else features(batch)
        moments = moments + Moments.of(maps.transpose(0, 1).flatten(1).T)
    moments = moments.of_all_ranks()
    found = min(head.dim, width)
    directions = moments.directions(found)
    last = [head.linear, *([head.nonlinear[2]] if head.nonlinear is not None else [])]
    for layer in last:
        layer.weight.zero_()
        layer.bias.zero_()
    weight[:found, :, 0, 0] = directions.to(weight)
    head.linear.bias[:found] = -(directions @ (moments.sum / moments.count)).to(weight)
    return True
