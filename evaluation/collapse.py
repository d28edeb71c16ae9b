"""Watching a self-distilled teacher for collapse: it then says the same of every picture, or nothing of any."""

import logging

log = logging.getLogger(__name__)

LIMITS = {
    "usage": (0.1, "below", "every picture gets the same prototypes"),
    "entropy": (0.99, "above", "its output is uniform"),
    "spread": (0.02, "below", "all pictures have the same features"),
}
"""Value -> the limit, the side on which a healthy run never stays, and what it means there."""

PATIENCE = 5
"""Looks in a row that must agree before it is said."""


class CollapseWatch:
    """Warns once when a value stays beyond its limit for PATIENCE looks, the first `grace` steps not counted.

    Values are those of `losses.self_distillation.entropies` and `spread`, all of them near 0 or 1 by construction.
    """

    def __init__(self, grace: int) -> None:
        self.grace = grace
        self.since: dict[str, int] = {}
        self.looks: dict[str, int] = {}
        self.warned = False

    def look(self, step: int, values: dict[str, float]) -> str | None:
        """Take the values of a step; the warning, if this step gives it (it is logged, too)."""
        if step < self.grace or self.warned:
            return None
        for name, (limit, side, meaning) in LIMITS.items():
            value = values[name]
            beyond = value < limit if side == "below" else value > limit
            self.looks[name] = self.looks.get(name, 0) + 1 if beyond else 0
            if self.looks[name] == 1:
                self.since[name] = step
            if self.looks[name] >= PATIENCE:
                self.warned = True
                message = (
                    f"the teacher has collapsed: train/teacher_{name} is {value:.3f}, {side} {limit:g}, since step "
                    f"{self.since[name]} ({meaning}); lower optim.student.lr, raise method.momentum, or lower "
                    "method.temperature.teacher"
                )
                log.warning(message)
                return message
        return None
