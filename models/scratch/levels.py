"""The levels of a network of our own, as timm tells them of its feature networks."""

from collections.abc import Sequence


class Levels(list):
    """timm's record of the levels of a network: each by its index, and widths and strides of those that are given."""

    def __init__(self, widths: Sequence[int], strides: Sequence[int], given: Sequence[int]) -> None:
        super().__init__({"num_chs": width, "reduction": stride} for width, stride in zip(widths, strides, strict=True))
        self.given = tuple(given)

    def channels(self) -> list[int]:
        return [self[number]["num_chs"] for number in self.given]

    def reduction(self) -> list[int]:
        return [self[number]["reduction"] for number in self.given]
