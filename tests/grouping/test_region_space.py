"""Clusters of regions, for regions that come later."""

import pytest
import torch

from common.errors import ConfigError
from grouping import spectral


def blobs() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows around four directions, at any length, and the direction of each."""
    draw = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 12, generator=draw)
    ids = torch.arange(60) % 4
    rows = centres[ids] + 0.05 * torch.randn(60, 12, generator=draw)
    return rows * (0.5 + torch.rand(60, 1, generator=draw)), ids


@pytest.mark.parametrize("components", [0, 5])
def test_new_regions_come_to_the_cluster_of_their_likes(components):
    rows, ids = blobs()
    space = spectral.region_space(rows[:40], 4, seed=0, components=components)
    assert space.axes.shape == (12, components)
    assert space.centroids.shape == (4, components or 12)
    found = space.assign(rows)
    names = found[:4]
    assert sorted(names.tolist()) == [0, 1, 2, 3]
    assert torch.equal(found, names[ids])
    assert torch.equal(spectral.region_classes(rows[:40], 4, seed=0, components=components), found[:40] + 1)


def test_more_components_than_there_can_be_are_refused():
    with pytest.raises(ConfigError) as caught:
        spectral.region_space(torch.randn(5, 12), 2, seed=0, components=6)
    assert str(caught.value) == "method.regions.pca=6: 5 regions of 12 channels have 5 components; lower it"
