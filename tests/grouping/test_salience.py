"""Maps of salience to masks, sizes and boxes."""

import pytest
import torch

from common.errors import ConfigError
from grouping import salience


def test_maps_are_stretched_by_themselves_by_the_batch_or_not_at_all():
    maps = torch.tensor([[[0.0, 0.2, 0.4]], [[0.5, 0.7, 1.0]]])
    found = {norm: salience.salient(maps, 0.45, norm)[:, 0].tolist() for norm in salience.NORMS}
    assert found["image"] == [[False, True, True], [False, False, True]]
    assert found["batch"] == found["none"] == [[False, False, False], [True, True, True]]
    assert not salience.salient(torch.ones(1, 2, 2)).any()  # nothing stands out
    with pytest.raises(ConfigError, match="norm"):
        salience.salient(maps, 0.5, "row")


def test_rows_are_those_of_the_floor():
    mask = torch.arange(12).view(3, 4)
    found = salience.at_size(mask, (5, 7))
    assert found[:, 0].tolist() == [0, 0, 4, 4, 8]
    assert found[0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert torch.equal(salience.at_size(found, (5, 7)), found)


def test_small_objects_have_no_box():
    mask = torch.zeros(6, 8, dtype=torch.bool)
    mask[1, 2] = mask[4, 5] = True
    assert salience.object_box(mask, 1)[:2] == (2, True)
    assert salience.object_box(mask, 1)[2].tolist() == [2, 1, 6, 5]
    area, keep, box = salience.object_box(mask, 2)
    assert (area, keep, box.tolist()) == (2, False, [0, 0, 0, 0])


def test_the_higher_of_two_means_is_the_best_split_of_all():
    draws = torch.Generator().manual_seed(0)
    scores, there = torch.rand(40, 6, generator=draws), torch.rand(40, 6, generator=draws) > 0.3
    for values, own, high in zip(scores, there, salience.upper_of_two(scores, there), strict=True):
        assert not (high & ~own).any()
        if own.sum() < 2:
            assert not high.any()
            continue

        def spread(upper, values=values, own=own):
            parts = values[own & upper], values[own & ~upper]
            return sum((part - part.mean()).square().sum() for part in parts if len(part))

        best = min(spread(values > edge) for edge in values[own].sort().values[:-1])
        assert spread(high) == pytest.approx(best)
        assert values[high].min() > values[own & ~high].max()
    assert not salience.upper_of_two(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool)).any()
