"""Masks: the share that was drawn, in blocks, the same from the same key."""

import numpy as np

from common.chance import numpy_generator
from models.vit.masking import block_masks


def draw(seed: int = 0) -> np.random.Generator:
    return numpy_generator(seed, "mask")


def test_shares_and_probability():
    masks = block_masks(draw(), 400, (8, 12), 0.5, (0.1, 0.5))
    counts = masks.sum((1, 2))
    hidden = counts > 0
    assert 0.4 < hidden.mean() < 0.6
    assert counts[hidden].min() >= round(0.1 * 96)
    assert counts.max() <= round(0.5 * 96)
    assert 0.25 < counts[hidden].mean() / 96 < 0.35


def test_the_number_is_met_exactly_and_in_blocks():
    masks = block_masks(draw(), 100, (8, 8), 1.0, (0.25, 0.25))
    assert (masks.sum((1, 2)) == 16).all()
    beside = (masks[:, 1:] & masks[:, :-1]).sum() + (masks[:, :, 1:] & masks[:, :, :-1]).sum()
    scattered = numpy_generator(0, "x").permuted(masks.reshape(100, -1), axis=1).reshape(masks.shape)
    alone = (scattered[:, 1:] & scattered[:, :-1]).sum() + (scattered[:, :, 1:] & scattered[:, :, :-1]).sum()
    assert beside > 2 * alone


def test_keyed_and_edges():
    assert (block_masks(draw(), 5, (6, 6), 1, (0.1, 0.5)) == block_masks(draw(), 5, (6, 6), 1, (0.1, 0.5))).all()
    assert (block_masks(draw(), 5, (6, 6), 1, (0.1, 0.5)) != block_masks(draw(1), 5, (6, 6), 1, (0.1, 0.5))).any()
    assert block_masks(draw(), 3, (4, 4), 1, (1.0, 1.0)).all()
    assert block_masks(draw(), 3, (1, 1), 1, (0.0, 0.0)).all()  # at least one patch
    assert not block_masks(draw(), 3, (4, 4), 0, (0.5, 0.5)).any()
