"""Keyed draws inside a detector: which boxes of a picture a loss is taken of."""

from collections.abc import Sequence

import torch
from torch import Tensor

from common import chance


class KeyedSampler:
    """Boxes of each picture, positive and negative ones, drawn by (seed, purpose, step, picture).

    At most `count` a picture, of which at most `positive` are positive; what positives leave free is negative. Takes
    the place of torchvision's sampler, which draws from the global stream.
    """

    def __init__(self, count: int, positive: float, purpose: str) -> None:
        self.count, self.positive, self.purpose = count, positive, purpose
        self.keys: Sequence[tuple[int, ...] | None] = ()
        """(seed, step, picture) of every picture of the batch, None for one that takes no part; set before the forward
        pass."""

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """labels: [N] of every picture, 1 and more positive, 0 negative, -1 neither. Masks of both, per picture."""
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for key, own in zip(self.keys, labels, strict=True):
            if key is None:
                for found in chosen:
                    found.append(torch.zeros_like(own, dtype=torch.bool))
                continue
            seed, *numbers = key
            draw = chance.generator(seed, f"detector.{self.purpose}", *numbers)
            left = self.count
            for found, places, most in (
                (chosen[0], (own >= 1).nonzero()[:, 0], int(self.count * self.positive)),
                (chosen[1], (own == 0).nonzero()[:, 0], self.count),
            ):
                number = min(len(places), most, left)
                left -= number
                order = torch.randperm(len(places), generator=draw)[:number].to(places.device)
                mask = torch.zeros_like(own, dtype=torch.bool)
                mask[places[order]] = True
                found.append(mask)
        return chosen
