"""One optimiser object for parameter groups of different algorithms, and schedules without state.

Lightning's automatic optimisation takes one optimiser, and `global_step` then counts batches. Methods need AdamW here
and Adam there, so `CompositeOptimizer` steps several torch optimisers as one.
"""

import math
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from lightning_modules.base.lars import Lars

ALGORITHMS = {"adam": Adam, "adamw": AdamW, "sgd": SGD, "lars": Lars}


class CompositeOptimizer(Optimizer):
    """Adam, AdamW, SGD and LARS groups behind one optimiser.

    A group is `{name, params, optimizer, lr, weight_decay, schedule, warmup, clip_norm, clip_value, owner}`; `owner` is
    `method` or `probe`. It may also have `lr_end` (where the schedule ends, default 0), `weight_decay_end` (the decay
    follows a cosine from `weight_decay` to it), `clip_each` (norm limit of every single parameter), `momentum` (of
    sgd and lars), `hold` (steps between two changes of its schedule, default 1), and what `schedule_factor` takes
    besides: `warmup_from`, `power`, `milestones`, `drop`, `decay_steps`. With `skip_method` set, the next step leaves
    parameters and state of the method's groups as they are.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        groups = [{**group, "params": list(group["params"])} for group in groups]
        super().__init__([{"params": group["params"]} for group in groups], {})
        self.skip_method = False
        self.children: list[Optimizer] = []
        for name, algorithm in ALGORITHMS.items():
            own = [self._group(group) for group in groups if group["optimizer"] == name]
            if own:
                self.children.append(algorithm(own, lr=own[0]["lr"]))
        self._link()

    @staticmethod
    def _group(group: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in group.items() if key != "optimizer"}
        return {**kept, "base_lr": group["lr"], "base_weight_decay": group["weight_decay"]}

    def _link(self) -> None:
        """Show the groups and states of the children as our own (Lightning and GradScaler look at them)."""
        self.param_groups = [group for child in self.children for group in child.param_groups]
        self.state = JoinedState(self.children)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.skip_method:  # torch's optimisers pass over parameters without gradient, state included
            for group in self.param_groups:
                if group["owner"] == "method":
                    for parameter in group["params"]:
                        parameter.grad = None
        for child in self.children:
            child.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"children": [child.state_dict() for child in self.children]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for child, state in zip(self.children, state_dict["children"], strict=True):
            child.load_state_dict(state)
            for parameter, kept in child.state.items():
                if any(isinstance(v, Tensor) and v.dim() and v.shape != parameter.shape for v in kept.values()):
                    raise ValueError("the state of an optimiser is of other weights")
        self._link()


class JoinedState(MutableMapping):
    """The states of several optimisers as one mapping; writes reach the optimiser that owns the parameter."""

    def __init__(self, children: list[Optimizer]) -> None:
        self.children = children
        self.owner = {p: child for child in children for group in child.param_groups for p in group["params"]}

    def __getitem__(self, parameter: Tensor) -> Any:
        return self.owner[parameter].state[parameter]

    def __setitem__(self, parameter: Tensor, value: Any) -> None:
        self.owner[parameter].state[parameter] = value

    def __delitem__(self, parameter: Tensor) -> None:
        del self.owner[parameter].state[parameter]

    def __iter__(self) -> Iterator[Tensor]:
        return (parameter for child in self.children for parameter in child.state)

    def __len__(self) -> int:
        return sum(len(child.state) for child in self.children)


def schedule_factor(
    schedule: str,
    step: int,
    total: int,
    warmup: int = 0,
    *,
    warmup_from: float | None = None,
    power: float = 0.9,
    milestones: Sequence[float] = (0.32, 0.56, 0.75),
    drop: float = 0.1,
    decay_steps: int = 100_000,
) -> float:
    """What the learning rate is multiplied by at `step` (0-based) of `total` steps.

    Linear warm-up from 1/warmup to 1 comes first, or, as in the releases of SegSort, HSG and DINOSAUR, from
    `warmup_from` at step 0. Then `constant`; `cosine` / `linear` down to zero at `total`; `poly`,
    (1 - step/total)^power, which the warm-up does not exceed; `step`, times `drop` at each of the `milestones` (shares
    of `total`, rounded down); or `exponential`, times `drop` in every `decay_steps`, smoothly (DINOSAUR).
    """
    rising = 1.0
    if step < warmup:
        rising = (step + 1) / warmup if warmup_from is None else warmup_from + (1 - warmup_from) * step / warmup
    if schedule == "poly":
        return min(rising, max(0.0, 1 - step / max(1, total)) ** power)
    if step < warmup:
        return rising
    if schedule == "step":
        return drop ** sum(step >= int(share * total) for share in milestones)
    if schedule == "exponential":
        return drop ** ((step - warmup) / decay_steps)
    if schedule == "constant":
        return 1.0
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * share)) if schedule == "cosine" else 1 - share


def cosine(start: float, end: float, step: int, total: int) -> float:
    """From `start` at step 0 to `end` at `total` and after, along half a cosine."""
    share = 0.5 * (1 - math.cos(math.pi * min(1.0, step / max(1, total))))
    return start * (1 - share) + end * share


def scheduled(group: dict[str, Any], step: int, total: int) -> dict[str, float]:
    """The learning rate and the weight decay of a group at `step` (0-based) of `total` steps."""
    step -= step % (group.get("hold") or 1)
    shape = {key: group[key] for key in ("warmup_from", "power", "milestones", "drop", "decay_steps") if key in group}
    factor = schedule_factor(group["schedule"], step, total, group["warmup"], **shape)
    end = 0.0 if step < group["warmup"] else group.get("lr_end") or 0.0
    values = {"lr": end + (group["base_lr"] - end) * factor}
    if group.get("weight_decay_end") is not None:
        values["weight_decay"] = cosine(group["base_weight_decay"], group["weight_decay_end"], step, total)
    return values


def clip_gradients(group: dict[str, Any]) -> None:
    """Limit the gradients of a group, in place, by whichever of its clip keys are set."""
    if group.get("clip_each") is not None:
        for parameter in group["params"]:
            nn.utils.clip_grad_norm_([parameter], group["clip_each"])
    if group["clip_norm"] is not None:
        nn.utils.clip_grad_norm_(group["params"], group["clip_norm"])
    if group["clip_value"] is not None:
        nn.utils.clip_grad_value_(group["params"], group["clip_value"])
