"""Keyed chance: every draw of ours is a function of (seed, purpose, numbers), never of a global stream.

So a draw is the same on any rank, any worker count and after any resume. The numbers are whatever the draw belongs to:
the epoch or step, the index of the picture, the position in the global batch.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from common.names import octets


def key(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for the draw named by its arguments."""
    text = "/".join([str(int(seed)), purpose, *(str(int(n)) for n in numbers)])
    return int.from_bytes(hashlib.blake2b(octets(text), digest_size=8).digest(), "big") >> 1


def generator(seed: int, purpose: str, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A torch generator for one draw. CPU and CUDA generators give different numbers for one key."""
    return torch.Generator(device=device).manual_seed(key(seed, purpose, *numbers))


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A numpy generator for one draw; cheap to make (Philox is counter-based)."""
    return np.random.Generator(np.random.Philox(key=key(seed, purpose, *numbers)))


@contextmanager
def library_draws(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """For code that draws from torch's global stream (layer initialisation): keyed inside, untouched outside."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, purpose, *numbers))
        yield
