"""MaskCut: masks of made features, gates, orientation, grids that are not square, and what stops."""

import numpy as np
import pytest
import scipy.linalg
import torch

from common.errors import ConfigError
from grouping import maskcut, spectral


def blocks(height, width, boxes, noise=0.02, seed=0):
    """Features [1,N,8]: a background, and boxes (y0, x0, y1, x1) with directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.zeros(8, height, width)
    maps[0] = 1
    for number, (top, left, bottom, right) in enumerate(boxes, start=1):
        maps[:, top:bottom, left:right] = 0
        maps[number, top:bottom, left:right] = 1
    maps = maps + noise * torch.randn(maps.shape, generator=generator)
    return maps.flatten(1).T[None]


def box_mask(height, width, box):
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[box[0] : box[2], box[1] : box[3]] = True
    return mask


BOXES = [(2, 2, 7, 8), (8, 10, 14, 18)]


def test_objects_of_a_wide_picture_come_one_after_the_other():
    found = maskcut.mask_cut(blocks(16, 20, BOXES), (16, 20), count=2)
    kept = {tuple(mask.flatten().nonzero()[:, 0].tolist()) for mask in found.masks[0]}
    assert kept == {tuple(box_mask(16, 20, box).flatten().nonzero()[:, 0].tolist()) for box in BOXES}
    assert found.accepted.all()
    assert torch.equal(found.paintings[0, 1], found.masks[0, 0])


def test_a_batch_gives_what_its_pictures_give():
    rows = torch.cat([blocks(16, 20, BOXES), blocks(16, 20, BOXES[:1], seed=1), blocks(16, 20, [], noise=0.3, seed=2)])
    together = maskcut.mask_cut(rows, (16, 20), count=3)
    for number in range(len(rows)):
        alone = maskcut.mask_cut(rows[number : number + 1], (16, 20), count=3)
        assert torch.equal(alone.masks[0], together.masks[number])
        assert torch.equal(alone.accepted[0], together.accepted[number])


def test_a_rejected_mask_ends_the_search():
    rows = blocks(16, 16, [(3, 3, 9, 9)], noise=0.002)
    stop = maskcut.mask_cut(rows, (16, 16), count=4, smallest=0.9)
    assert stop.accepted[0].tolist() == [True, False, False, False]
    assert stop.seeds[0, 2:].tolist() == [-1, -1]


def test_a_mask_that_was_rejected_comes_back_as_released():
    """The case of the reference in small: nothing was blanked out, and an empty mask overlaps nothing."""
    rows = torch.randn(1, 144, 3, generator=torch.Generator().manual_seed(1))
    found = maskcut.mask_cut(rows, (12, 12), count=4, overlap=0.0, smallest=0.0, on_reject="released")
    assert found.accepted[0].tolist() == [True, True, False, True]
    assert torch.equal(found.candidates[0, 2], found.candidates[0, 3])
    assert torch.equal(found.masks[0, 3], found.candidates[0, 3] & ~found.masks[0, :2].any(0))


def test_masks_of_a_picture_do_not_overlap():
    rows = torch.randn(3, 225, 12, generator=torch.Generator().manual_seed(3))
    found = maskcut.mask_cut(rows, (15, 15), count=4, on_reject="released", tau=0.05)
    assert int(found.masks.sum(1).max()) <= 1


def test_blanked_affinities_are_those_of_blanked_features():
    rows = blocks(8, 9, [(1, 1, 4, 5)], noise=0.4)
    painting = torch.zeros(1, 72, dtype=torch.bool)
    painting[0, 10:30] = True
    affinity = spectral.threshold_affinity(rows, 0.15)
    maskcut.blank_affinity(affinity, painting, 1e-5)
    assert torch.equal(affinity, spectral.threshold_affinity(maskcut.blank(rows, painting), 0.15))


def test_vectors_of_blanked_graphs_are_the_dense_ones():
    rows = blocks(16, 20, BOXES, noise=0.3, seed=5)
    found = maskcut.mask_cut(rows, (16, 20), count=2)
    weights = spectral.threshold_affinity(maskcut.blank(rows, found.paintings[:, 1].flatten(1)), 0.15)[0].double()
    degree = weights.sum(1).diag().numpy()
    _, vectors = scipy.linalg.eigh(degree - weights.numpy(), degree, subset_by_index=[1, 1])
    ours = found.vectors[0, 1].flatten().double().numpy()
    cosine = abs(ours @ vectors[:, 0]) / np.linalg.norm(ours) / np.linalg.norm(vectors[:, 0])
    assert cosine > 0.99999


def test_both_signs_give_one_half_unless_as_released():
    vector = torch.full((1, 6, 6), 0.2)
    vector[0, 2:4, 2:4] = -1.0  # the corners' half is above the mean, the peak below it
    vectors = torch.cat([vector, -vector])
    own = maskcut.halves(vectors)
    assert torch.equal(own.foreground[0], own.foreground[1])
    assert own.foreground[0].sum() == 4
    peak_with_corners = torch.full((1, 6, 6), 1.0)
    peak_with_corners[0, 2:4, 2:4] = -0.2
    vectors = torch.cat([peak_with_corners, -peak_with_corners])
    assert maskcut.halves(vectors).foreground.sum((1, 2)).tolist() == [4, 4]
    assert maskcut.halves(vectors, "released").foreground.sum((1, 2)).tolist() == [4, 32]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ({"tau": -0.1}, "maskcut.tau=-0.1"),
        ({"on_reject": "go"}, "maskcut.on_reject"),
        ({"orient": "up"}, "maskcut.orient"),
    ],
)
def test_settings_that_cannot_be_are_refused(words, line):
    with pytest.raises(ConfigError, match=line):
        maskcut.mask_cut(blocks(4, 4, []), (4, 4), **words)
