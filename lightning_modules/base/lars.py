"""LARS: momentum SGD whose step is, for every matrix, in proportion to the length of its weights.

You et al., Large Batch Training of Convolutional Networks, 2017, in the form of Barlow Twins and SlotCon: the length
that a step is divided by is that of the gradient with its decay (timm's `Lars` takes the sum of the two lengths).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Lars(Optimizer):
    """d = g + decay w; d <- eta |w| / |d| d; u <- momentum u + d; w <- w - lr u.

    Vectors and scalars (biases, norms) are neither decayed nor scaled. Where |w| or |d| is 0, d stays as it is.
    """

    def __init__(
        self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, eta: float = 1e-3
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                change = weight.grad
                if weight.dim() > 1:
                    change = change.add(weight, alpha=group["weight_decay"])
                    length, size = torch.linalg.vector_norm(weight), torch.linalg.vector_norm(change)
                    ratio = group["eta"] * length / size
                    change = change * torch.where((length > 0) & (size > 0), ratio, torch.ones_like(ratio))
                state = self.state[weight]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(change)
                weight.add_(buffer, alpha=-group["lr"])
        return loss
