"""Over-segmentation: what follows contours, how many regions, ids, and values that are refused."""

import numpy as np
import pytest

from common.errors import ConfigError
from common.spec import RegionSpec
from datamodules.scenes.drawing import draw_scene
from grouping.regions import colour_gradient, ordered, over_segment

SMALL = {"min_size": 20}


@pytest.fixture(scope="module")
def scene():
    return draw_scene(0, "train", 1, 96, 96)


def halves() -> np.ndarray:
    image = np.full((40, 60, 3), 40, np.uint8)
    image[:, 30:] = (200, 60, 30)
    return image


@pytest.mark.parametrize(
    "spec",
    [RegionSpec(min_size=150), RegionSpec(source="watershed", thresholds=(0.3, 0.5))],
    ids=lambda spec: spec.source,
)
def test_two_halves_are_two_regions(spec):
    ids = over_segment(halves(), spec)
    assert ids.dtype == np.int32
    assert ids.shape == (40, 60)
    assert (ids[:, :27] == 0).all()
    assert (ids[:, 33:] == 1).all()


@pytest.mark.parametrize("source", ["felzenszwalb", "slic"])
def test_regions_are_purer_than_a_grid_of_as_many_cells(source):
    """In the exact labels of drawn scenes: the share of pixels that have the commonest class of their region."""

    def purity(regions: np.ndarray, label: np.ndarray) -> float:
        return sum(np.bincount(label[regions == k]).max() for k in np.unique(regions)) / label.size

    gains = []
    for index in range(4):
        image, label = draw_scene(0, "train", index, 96, 96)
        ids = over_segment(image, RegionSpec(source=source, most=80, thresholds=(100,), **SMALL))
        side = round((ids.max() + 1) ** 0.5)
        rows, columns = np.mgrid[:96, :96] * side // 96
        gains.append(purity(ids, label) - purity(rows * side + columns, label))
    assert np.mean(gains) > 0.03


def test_the_threshold_is_raised_until_there_are_few_enough(scene):
    counts = {
        most: over_segment(scene[0], RegionSpec(most=most, thresholds=(30, 100, 300, 1000, 4000), **SMALL)).max() + 1
        for most in (1000, 60, 12)
    }
    assert counts[1000] > 60 >= counts[60] > 12 >= counts[12]
    one = over_segment(scene[0], RegionSpec(most=1, thresholds=(30,), **SMALL))
    assert one.max() + 1 == counts[1000]  # no higher threshold is left


def test_the_same_picture_has_the_same_regions(scene):
    for source in ("felzenszwalb", "slic"):
        spec = RegionSpec(source=source, **SMALL)
        assert np.array_equal(over_segment(scene[0], spec), over_segment(scene[0].copy(), spec))


def test_ids_follow_the_first_pixel():
    ids = np.array([[7, 7, -3], [2, 7, -3]])
    assert ordered(ids).tolist() == [[0, 0, 1], [2, 0, 1]]


def test_the_gradient_lies_on_the_edge_and_a_flat_picture_has_none():
    strength = colour_gradient(halves())
    assert strength[20].argmax() in (29, 30)
    assert strength[20, :15].max() < 0.01
    assert colour_gradient(np.zeros((8, 8, 3), np.uint8)).max() == 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            RegionSpec(source="hed"),
            "method.regions.source=hed: not one of felzenszwalb, watershed, slic, folder",
        ),
        (
            RegionSpec(source="folder"),
            "method.regions.source=folder: set method.regions.root to the folder of region files",
        ),
        (RegionSpec(most=0), "method.regions.most=0: must be at least 1"),
        (
            RegionSpec(thresholds=(0.0, 1.0)),
            "method.regions.thresholds=[0.0, 1.0]: expected numbers above 0, such as [100,300,1000]",
        ),
        (RegionSpec(sigma=-1.0), "method.regions.sigma=-1: must not be negative"),
        (RegionSpec(compactness=0.0), "method.regions.compactness=0: must be above 0"),
    ],
)
def test_values_that_are_refused(spec, message):
    with pytest.raises(ConfigError) as caught:
        over_segment(halves(), spec)
    assert str(caught.value) == message
