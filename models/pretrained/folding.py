"""Batch norms of a frozen convolutional network folded into the convolutions before them: the same function, faster."""

import copy
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

TOLERANCE = 1e-3
"""Largest difference relative to the largest output; rounding stays far below it, an error far above."""


@torch.no_grad()
def fold_batch_norms(net: nn.Module, channels: int = 3) -> nn.Module:
    """A copy of `net` (in evaluation mode) without the batch norms that directly follow a convolution.

    Neighbours in a parent module are taken for a pair, so the result is checked on a random picture; where it is not
    the same function (a network that calls its parts in another order), or nothing can be folded, `net` itself is
    returned.
    """
    folded = copy.deepcopy(net)
    if not _fold(folded):
        return net
    probe = torch.rand(1, channels, 64, 64, generator=torch.Generator().manual_seed(0))
    probe = probe.to(next(net.parameters()).device)
    before, after = _outputs(net, probe), _outputs(folded, probe)
    same = all((a - b).abs().max() <= TOLERANCE * a.abs().max() for a, b in zip(before, after, strict=True))
    return folded if same else net


def _outputs(net: nn.Module, pictures: Tensor) -> list[Tensor]:
    result = net(pictures)
    return list(result) if isinstance(result, list | tuple) else [result]


def _fold(module: nn.Module) -> int:
    """Fold all pairs below `module` in place; how many there were."""
    names = list(module._modules)
    count = sum(_fold(child) for child in module.children())
    for first, second in pairwise(names):
        conv, norm = module._modules[first], module._modules[second]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, _BatchNorm) and norm.running_var is not None:
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            bias = norm.bias - norm.running_mean * scale
            conv.weight = nn.Parameter(conv.weight * scale[:, None, None, None], requires_grad=False)
            conv.bias = nn.Parameter(bias if conv.bias is None else bias + conv.bias * scale, requires_grad=False)
            # timm's batch norms carry dropout and activation with them; plain ones are followed by their own.
            rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
            module._modules[second] = nn.Sequential(*rest) if rest else nn.Identity()
            count += 1
    return count
