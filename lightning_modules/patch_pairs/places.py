"""Where the two patches of a pair lie, as IIC's baselines draw them (xu-ji/IIC, ICCV 2019), and what is cut out there.

Places are (row, column) in pixels of the picture, int64 [n,2]; a patch of `side` px reaches side // 2 px beyond its
place. Whatever is drawn comes in as numbers in 0..1, so that a draw is a pure function.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError

ADJACENT = 0.5
"""Probability that a pair of co-occurrence is adjacent."""
LEAST = 4
"""Sides of a patch that a picture must have: with fewer, hardly a pair (or none) fits into it."""


@dataclass(frozen=True)
class Pairs:
    """A pair of each picture: the first patch's place, the other's, and what is to be told of them."""

    centre: Tensor
    other: Tensor
    target: Tensor
    """int64 [n]: the direction of the other patch, or 1 where it is adjacent and 0 where it is far."""


Draw = Callable[[np.random.Generator, int, tuple[int, int], int, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]
"""(generator, count, picture's size, side, targets to keep or -1) -> (centres, others, targets)."""


def centres(uniform: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """First places of pictures of `size` (height, width), 1.5 sides from the border or more; uniform float64 [n,2]."""
    return np.floor(uniform * (np.array(size) - 3 * side) + 1.5 * side).astype(np.int64)


def in_direction(
    uniform: np.ndarray, radius: np.ndarray, direction: np.ndarray, size: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """(first, other) places: the other lies in one of eight directions, 1.5 to 2 sides away.

    uniform float64 [n,2], radius [n] in 0..1; direction int [n]: 0 is to the right, each next one an eighth of a turn
    further down; 8 is 0 once more.
    """
    first = centres(uniform, size, side)
    return first, _beside(first, (1.5 + 0.5 * radius) * side, direction * (np.pi / 4))


def adjacent_or_far(
    uniform: np.ndarray, adjacent: np.ndarray, a: np.ndarray, b: np.ndarray, size: tuple[int, int], side: int
) -> tuple[np.ndarray, np.ndarray]:
    """(first, other) places: adjacent ones touch at a corner, far ones are two sides apart or more.

    adjacent bool [n]: where true, a and b are -1 or 1, rows and columns to the other, in sides. Where false they are
    uniform in 0..1: the distance, from two sides to the picture's shorter side, and the angle.
    """
    first = centres(uniform, size, side)
    corner = first + side * np.stack([a, b], axis=1)
    far = _beside(first, 2 * side + (min(size) - 2 * side) * a, 2 * np.pi * b)
    return first, np.where(adjacent[:, None], corner, far).astype(np.int64)


def _beside(first: np.ndarray, distance: np.ndarray, angle: np.ndarray) -> np.ndarray:
    offset = distance[:, None] * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    return np.trunc(first + offset).astype(np.int64)


def inside(places: np.ndarray, size: tuple[int, int], side: int) -> np.ndarray:
    """bool [n]: whether the patch around a place lies in the picture as a whole."""
    half = side // 2
    return ((places >= half) & (places + half < np.array(size))).all(axis=1)


def draw_directions(count: int) -> Draw:
    """The draw of context prediction among `count` directions. A pair that does not fit is drawn anew as a whole."""

    def draw(rng: np.random.Generator, n: int, size: tuple[int, int], side: int, _: np.ndarray):
        direction = rng.integers(count, size=n)
        return *in_direction(rng.random((n, 2)), rng.random(n), direction, size, side), direction

    return draw


def draw_adjacency(rng: np.random.Generator, n: int, size: tuple[int, int], side: int, kept: np.ndarray):
    """The draw of co-occurrence. A pair that does not fit is drawn anew, but stays adjacent or far, as it was."""
    adjacent = np.where(kept < 0, rng.random(n) < ADJACENT, kept == 1)
    a, b = np.where(adjacent, rng.choice([-1.0, 1.0], size=(2, n)), rng.random((2, n)))
    return *adjacent_or_far(rng.random((n, 2)), adjacent, a, b, size, side), adjacent.astype(np.int64)


def expect_room(size: tuple[int, int], side: int) -> None:
    """Raises ConfigError for pictures (height, width) that are too small for pairs of such patches."""
    if min(size) < LEAST * side:
        raise ConfigError(
            f"method.side={side}: a pair of patches needs training pictures of {LEAST} sides, {LEAST * side} px, and "
            f"theirs is {min(size)} px; set {min(size) // LEAST} or less, or larger pictures (data.train_size)"
        )


def draw_pairs(
    seed: int, step: int, pictures: int, size: tuple[int, int], side: int, draw: Draw, shared: bool = False
) -> Pairs:
    """Pairs of this rank's `pictures`, out of one draw for the global batch, keyed by (seed, step); on the CPU.

    shared: one pair serves all pictures of the step, as released. Raises ConfigError where pairs cannot fit.
    """
    expect_room(size, side)
    count = 1 if shared else pictures * distributed.world_size()
    rng = chance.numpy_generator(seed, "patch_pairs.places", step)
    first, other, target = draw(rng, count, size, side, np.full(count, -1))
    while len(missed := np.flatnonzero(~inside(other, size, side))):
        first[missed], other[missed], target[missed] = draw(rng, len(missed), size, side, target[missed])
    rows = [torch.from_numpy(np.ascontiguousarray(part)) for part in (first, other, target)]
    if shared:
        return Pairs(*(row.expand(pictures, *row.shape[1:]) for row in rows))
    return Pairs(*(distributed.own_slice(row) for row in rows))


def counted(valid: Tensor, centre: Tensor, other: Tensor) -> Tensor:
    """bool [B]: the pairs that have at least one place where `valid` [B,H,W] is true, as released.

    There it is a mask made of labels; here it leaves out padding alone.
    """
    rows = torch.arange(len(valid), device=valid.device)
    return valid[rows, centre[:, 0], centre[:, 1]].bool() | valid[rows, other[:, 0], other[:, 1]].bool()


def cut_features(maps: Tensor, place: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """The features [B,C,n,n] of the n = 2 (side // 2) + 1 pixels around each place, as if maps [B,C,h,w] of pictures of
    `size` px were enlarged to that (bilinear); nothing else is enlarged. With gradient."""
    reach = torch.arange(-(side // 2), side // 2 + 1, device=place.device)
    rows, columns = (
        _mixed(place[:, axis, None] + reach, maps.shape[2 + axis], size[axis], maps.dtype) for axis in (0, 1)
    )
    with torch.autocast(maps.device.type, enabled=False):
        return rows[:, None] @ (maps @ columns.mT[:, None])


def _mixed(pixels: Tensor, cells: int, length: int, dtype: torch.dtype) -> Tensor:
    """How pixels [B,n] of an axis of `length` px mix its cells: weights [B,n,cells] of bilinear enlargement."""
    source = ((pixels.double() + 0.5) * (cells / length) - 0.5).clamp(0, cells - 1)
    distance = (source[..., None] - torch.arange(cells, device=pixels.device)).abs()
    return (1 - distance).clamp(min=0).to(dtype)


def cut_picture(images: Tensor, place: Tensor, side: int) -> Tensor:
    """Windows [B,C,side,side] of pictures [B,C,H,W], those of an even side half a pixel above and left of the place."""
    reach = torch.arange(side, device=place.device) - side // 2
    rows, columns = place[:, 0, None] + reach, place[:, 1, None] + reach
    picture = torch.arange(len(images), device=place.device)[:, None, None]
    return images[picture, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
