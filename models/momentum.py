"""A copy of a module that follows it slowly."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import ConfigError


class Momentum(nn.Module):
    """Exponential moving average of a module's weights; it starts equal and never receives gradient.

    The copy's weights are in the state dict (under `copy.`); the followed module is only referred to. So build it after
    the module has its initial weights, and save both in one checkpoint. Source: HP (CVPR 2023); MoCo (CVPR 2020).
    """

    def __init__(self, module: nn.Module):
        super().__init__()
        self.copy = copy.deepcopy(module).requires_grad_(False)
        # In a tuple, so that the followed module is not registered, moved and saved a second time.
        self._followed = (module,)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The copy's output, without gradient."""
        return self.copy(*args, **kwargs)

    @torch.no_grad()
    def update(self, m: float) -> None:
        """theta' <- m theta' + (1 - m) theta for every weight; buffers are taken over as they are.

        Raises:
            ConfigError: m outside [0, 1].
        """
        (module,) = self._followed
        follow(self.copy, module, m)
        for slow, fast in zip(self.copy.buffers(), module.buffers(), strict=True):
            slow.copy_(fast)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, m: float) -> None:
    """theta' <- m theta' + (1 - m) theta for every weight of `slow`, in place; buffers are left alone.

    Raises:
        ConfigError: m outside [0, 1].
    """
    if not 0.0 <= m <= 1.0:
        raise ConfigError(f"momentum m = {m}: must lie in [0, 1]; 1 keeps the copy as it is")
    old, new = [p.data for p in slow.parameters()], [p.data for p in fast.parameters()]
    if len(old) != len(new):
        raise ValueError(f"{len(old)} weights cannot follow {len(new)}")
    torch._foreach_mul_(old, m)
    torch._foreach_add_(old, new, alpha=1.0 - m)


@torch.no_grad()
def towards(slow: Tensor, fast: Tensor, m: float) -> None:
    """slow <- m slow + (1 - m) fast, in place, for one tensor."""
    slow.mul_(m).add_(fast.detach(), alpha=1.0 - m)


def warmed_up(count: int, most: float) -> float:
    """The momentum of the `count`-th update, from 1, of an average that starts as a mean: 0 for the first two, then
    1 - 1/count, `most` at most. Until then the average is that of the states of updates 2 (twice) to `count`, because
    update 2 copies as update 1 does. Source: PriMaPs (TMLR 2024)."""
    return 0.0 if count < 3 else min(1.0 - 1.0 / count, most)
