"""Positives as a list of pairs are those of the masks; the bfloat16 sieve changes none of them, and its bound holds."""

import pytest
import torch

from losses.contrastive import pairs, positive_mask
from losses.contrastive.pairs import find_pairs, ordered, pair_products, places
from tests.losses.contrastive.test_ways import smooth

TOTAL = 324


def masks(found, anchors, kinds):
    """What the pairs say as masks [rows,N] of the anchors."""
    built = torch.zeros(kinds, TOTAL, TOTAL, dtype=torch.bool)
    for number in range(kinds):
        ahead, back = (found.bits >> (2 * number) & bit != 0 for bit in (pairs.TO_SECOND, pairs.TO_FIRST))
        built[number, found.first[ahead], found.second[ahead]] = True
        built[number, found.second[back], found.first[back]] = True
    outside = torch.ones(TOTAL, dtype=torch.bool)
    outside[anchors] = False
    assert not built[:, outside].any()
    return built[:, anchors]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [None, (7, 13), (40, 48)], ids=str)
@pytest.mark.parametrize("anchors", [slice(0, 324), slice(0, 81), slice(81, 243), slice(243, 324)], ids=str)
def test_pairs_are_those_of_the_masks(anchors, shape, symmetric, half):
    case = smooth()
    kinds = [(case["f"], case["threshold_ag"]), (case["s_ema"], case["threshold_sp"])]
    found = find_pairs(kinds, anchors, symmetric, half=half, shape=shape)
    for mask, kind in zip(masks(found, anchors, 2), kinds, strict=True):
        assert mask.any()
        assert torch.equal(mask, positive_mask(*kind, anchors, symmetric=symmetric))
    keys = found.first * TOTAL + found.second
    assert (keys.diff() > 0).all()
    assert found.bits.all()
    inside = (found.second >= anchors.start) & (found.second < anchors.stop)
    assert (found.first < found.second)[inside].all()


def test_products_of_pairs():
    case = smooth()
    anchors = slice(81, 243)
    found = find_pairs([(case["f"], case["threshold_ag"])], anchors, True)
    expected = (case["z"][found.first] * case["z"][found.second]).sum(1)
    torch.testing.assert_close(pair_products(case["z"], found.first, found.second, anchors), expected)


def test_float64_is_never_sieved(monkeypatch):
    case = smooth()
    monkeypatch.setattr(pairs, "_rounded", lambda *kind: pytest.fail("sieved"))
    kinds = [(case["f"].double(), case["threshold_ag"].double())]
    find_pairs(kinds, slice(0, TOTAL), True, half=True)


# ---------------------------------------------------------------- attacks on the sieve


def whole_rows(count, width, low, high, seed=0):
    """Rows of whole multiples of 2^-12, whose products and sums float32 holds exactly in any order, and bfloat16 does
    not: a number takes up to 11 bits, a sum of 16 of their products less than 24."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, width), generator=draw).float() / 4096


@pytest.mark.parametrize(("low", "high"), [(1, 1024), (-1023, 1024)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_thresholds_at_the_very_products_are_told_apart(symmetric, low, high):
    """Each row's threshold is one of its own products: that one does not pass, all that are greater by one step do."""
    rows = whole_rows(300, 16, low, high)
    exact = rows.double() @ rows.double().T
    assert torch.equal((rows @ rows.T).double(), exact)
    exact.fill_diagonal_(-9.0)
    threshold = exact.sort(1).values[:, -40].float()
    above = exact > threshold.double()[:, None]
    expected = (above | above.T if symmetric else above).nonzero()
    found = find_pairs([(rows, threshold)], slice(0, 300), symmetric, half=True)
    assert above.sum(1).max() == 39
    ahead, back = (found.bits & bit != 0 for bit in (pairs.TO_SECOND, pairs.TO_FIRST))
    got = torch.cat([torch.stack([found.first[ahead], found.second[ahead]], 1),
                     torch.stack([found.second[back], found.first[back]], 1)])  # fmt: skip
    assert torch.equal(got[(got[:, 0] * 300 + got[:, 1]).argsort()], expected)


@pytest.mark.parametrize("width", [11, 75, 509])
@pytest.mark.parametrize("step", [1, 3])
def test_rows_that_lose_the_most_by_rounding_are_found(width, step):
    """Every number lies halfway between two bfloat16 ones and is rounded towards 0, so all errors of a product add up,
    and thresholds are the float32 products less one step: each pair is a positive by the smallest margin."""
    rows = torch.full((20, width), (1.0 + 2.0**-8) / 32)
    threshold = (rows @ rows.T).amin(1)
    for _ in range(step):
        threshold = threshold.nextafter(torch.tensor(-9.0))
    sieved = rows.bfloat16()
    assert ((sieved @ sieved.T) < threshold * 0.993).all(), "rounding alone misses them"
    found = find_pairs([(rows, threshold)], slice(0, 20), True, half=True)
    assert len(found.first) == 20 * 19 // 2


@pytest.mark.parametrize("seed", range(3))
def test_the_bound_holds(seed):
    """Lowered thresholds are reached by the sieve's products wherever float64 ones reach the given ones."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(400, 384, generator=draw) + 2.0, dim=1)
    exact = rows.double() @ rows.double().T
    for scale in (1.0, 1e-3, 30.0):
        given = (exact[0] * scale**2).float()  # every product of row 0 is a threshold
        sieve, lower = pairs._rounded(rows * scale, given)
        assert ((sieve[:1] @ sieve.T)[0] >= lower).all()
        assert (lower.double() < given.double()).all()
        assert ((given - lower) < 0.02 * scale**2).all(), "a sieve that lets all through"


@pytest.mark.parametrize("half", [False, True])
def test_thresholds_that_nothing_or_everything_passes(half):
    rows = smooth()["f"]
    for limit, count in ((torch.inf, 0), (-torch.inf, TOTAL * (TOTAL - 1) // 2), (torch.nan, 0)):
        found = find_pairs([(rows, rows.new_full((TOTAL,), limit))], slice(0, TOTAL), True, half=half)
        assert len(found.first) == count


@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("share", [0.0, 0.05, 1.0])
def test_places_are_those_of_the_entries_that_are_not_zero(dtype, share):
    values = (torch.rand(13, 21, generator=torch.Generator().manual_seed(0)) < share).to(dtype)
    for part in (values, values[:, 3:10], values.T):
        assert all(torch.equal(a, b) for a, b in zip(places(part), part.nonzero(as_tuple=True), strict=True))


@pytest.mark.parametrize("total", [70, 1 << 16, 1 << 17])
def test_an_index_is_ordered_with_equal_ones_as_they_come(total):
    index = torch.randint(total - 60, total, (500,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ordered(index, total), index.argsort(stable=True))
