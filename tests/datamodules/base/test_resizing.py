"""Resizing by name equals the libraries that the names stand for."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from common.spec import Geometric
from datamodules.base import resizing
from datamodules.base.transforms import Geometry, draw_geometry
from tests.datamodules.pictures import noise

SIZES = [(320, 320), (33, 57), (200, 140), (75, 90), (7, 300)]


@pytest.mark.parametrize("size", SIZES)
def test_plain_bilinear_is_torchs_resize_of_tensors(size):
    picture = noise(150, 140)
    found = resizing.resize_picture(picture, size, "bilinear_plain")
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].double()
    expected = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=False)[0].permute(1, 2, 0)
    assert found.dtype == np.uint8
    assert np.abs(found - expected.numpy()).max() <= 0.5 + 1e-3
    if size != (200, 140):  # an enlarged side has no antialias to leave out
        assert not np.array_equal(found, resizing.resize_picture(picture, size, "bilinear"))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["nearest_corner", "bilinear_plain"])
def test_nearest_at_corners_is_opencvs_and_that_of_labels_beside(size, name):
    """INTER_NEAREST: new pixel i is old pixel floor(i * old / new), in OpenCV's double precision."""
    picture, ids = noise(150, 140), np.arange(150 * 140).reshape(150, 140)
    rows, columns = (
        [math.floor(i * (1 / (new / old))) for i in range(new)] for old, new in zip((150, 140), size, strict=True)
    )
    assert np.array_equal(resizing.resize_ids(ids, size, name), ids[np.ix_(rows, columns)])
    assert np.array_equal(Geometry(size, "none", name).resize_map(ids), ids[np.ix_(rows, columns)])
    if name == "nearest_corner":
        assert np.array_equal(resizing.resize_picture(picture, size, name), picture[np.ix_(rows, columns)])


def test_pillows_nearest_looks_at_centres():
    ids = np.arange(16).reshape(4, 4)
    assert resizing.resize_ids(ids, (2, 2), "nearest").tolist() == [[5, 7], [13, 15]]
    assert resizing.resize_ids(ids, (2, 2), "nearest_corner").tolist() == [[0, 2], [8, 10]]


def test_crops_uniform_in_side():
    """Shares of the sides 0.4 to 0.9, each as often as any other; uniform in area, small ones would be rare."""
    draw = np.random.default_rng(0)
    spec = Geometric(size=(40, 80), sides=(0.4, 0.9), flip_p=0.5)
    found = draw_geometry(spec, 4000, (1000, 2000), draw)
    top, left, height, width = found.boxes.T
    share = height / 1000
    assert (width - 2 * height).abs().max() <= 2
    assert min(top.min(), left.min()) >= 0
    assert max((top + height).max() / 1000, (left + width).max() / 2000) <= 1
    counts = np.histogram(share, bins=5, range=(0.4, 0.9))[0]
    assert np.abs(counts / 4000 - 0.2).max() < 0.03
    assert found.size == (40, 80)


def test_crops_in_tenths_are_the_released_sides():
    spec = Geometric(sides=(0.4, 0.9), side_step=0.1)
    heights = draw_geometry(spec, 500, (320, 320), np.random.default_rng(0)).boxes[:, 2]
    assert sorted(set(heights.tolist())) == [int(320 * tenths / 10) for tenths in range(4, 10)]
