"""The dense sweep and the sparse sum give the same loss and gradients, and counted work chooses between them."""

import functools
import itertools

import pytest
import torch
from torch.nn import functional as F

from losses import contrastive
from losses.contrastive import ghp_contrastive, pairs, positive_mask, sparse, work
from tests.losses.contrastive.cases import call, no_positives, scene, with_gradients
from tests.reference import framework
from tests.reference import hidden_positives as replayed

FULL = {"rtol": 1e-9, "atol": 1e-11}


def smooth(pictures=4, side=9, dim=24, channels=20, pool=60, rho=0.05, seed=3):
    """Maps with structure in float32, so that patches of a place and of a picture are positives of each other."""
    draw = torch.Generator().manual_seed(seed)

    def unit(width):
        coarse = torch.randn(pictures, width, 3, 3, generator=draw)
        maps = F.interpolate(coarse, size=(side, side), mode="bilinear")
        maps = maps + 0.3 * torch.randn(maps.shape, generator=draw)
        return F.normalize(maps.flatten(2).transpose(1, 2).reshape(-1, width), dim=1)

    case = {"z": unit(dim), "z_mix": unit(dim), "f": unit(channels), "s_ema": unit(dim), "cells": side * side}
    for rows, threshold in (("f", "threshold_ag"), ("s_ema", "threshold_sp")):
        chosen = torch.randint(len(case["z"]), (pool,), generator=draw)
        noise = 0.05 * torch.randn(pool, case[rows].shape[1], generator=draw)
        case[threshold] = (case[rows] @ F.normalize(case[rows][chosen] + noise, dim=1).T).amax(1)
    case["candidates"] = torch.rand(side * side, len(case["z"]), generator=draw) < rho
    return case


def doubled(case):
    return {key: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
            for key, value in case.items()}  # fmt: skip


def both(case, **settings):
    return [with_gradients(case, contrast=contrast, **settings) for contrast in ("dense", "sparse")]


SETTINGS = [
    dict(zip(("version", "denominator", "symmetric", "reweighting"), values, strict=True))
    for values in itertools.product((1, 2, "2-fixed"), ("agnostic", "positives"), (True, False), (True, False))
]
MORE = [
    {"lam": 0.0},
    {"z_mix": None},
    {"f": None, "threshold_ag": None},
    {"s_ema": None, "threshold_sp": None},
    {"guarded": False},
    {"candidates": None},
    {"temperature": 0.05},
    {"block_bytes": 1},
]


@pytest.mark.parametrize("pictures", [None, (1, 2)], ids=str)
@pytest.mark.parametrize("settings", [*SETTINGS, *MORE], ids=str)
def test_both_ways_agree_on_any_rank(settings, pictures):
    """To rounding in float64, and to that of float32: 1e-6 of the value, 1e-5 of the largest entry of a gradient."""
    case = smooth()
    for one, other in zip(*both(doubled(case), pictures=pictures, **settings), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.isfinite().all()
            torch.testing.assert_close(other, one, **FULL)
    (loss, *grads), (found, *slopes) = both(case, pictures=pictures, **settings)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    for grad, slope in zip(grads, slopes, strict=True):
        if grad is not None:
            assert (slope - grad).abs().max() <= 1e-5 * grad.abs().max()


@pytest.mark.parametrize("guarded", [True, False])
@pytest.mark.parametrize("version", [1, "2-fixed"])
@pytest.mark.parametrize("candidates_too", [True, False])
@pytest.mark.parametrize("rows", [slice(3, 4), slice(0, 12), slice(0, 36)], ids=str)
def test_both_ways_agree_without_positives_and_with_empty_denominators(rows, candidates_too, version, guarded):
    case = no_positives(scene(), rows, candidates_too)
    for one, other in zip(*both(case, version=version, guarded=guarded), strict=True):
        torch.testing.assert_close(other, one, equal_nan=True, **FULL)


def test_no_candidate_at_all():
    case = scene() | {"candidates": torch.zeros(12, 36, dtype=torch.bool)}
    for one, other in zip(*both(case, denominator="positives"), strict=True):
        torch.testing.assert_close(other, one, **FULL)


def test_a_candidate_that_is_a_positive_too_counts_once():
    """All patches are positives and candidates: exp(s) of a patch is in a denominator once."""
    case = doubled(smooth())
    case["threshold_ag"] = torch.full_like(case["threshold_ag"], -2.0)
    whole = torch.ones_like(case["candidates"])
    for one, other in zip(with_gradients(case | {"candidates": whole}, contrast="sparse"),
                          with_gradients(case | {"candidates": None}, contrast="dense"), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, **FULL)


def test_ranks_sum_to_the_whole():
    case = doubled(smooth())
    whole = with_gradients(case, contrast="sparse")
    parts = [with_gradients(case, contrast="sparse", pictures=(first, 1)) for first in range(4)]
    for one, *ranks in zip(whole, *parts, strict=True):
        torch.testing.assert_close(sum(ranks) / 4, one, **FULL)


def test_the_same_numbers_twice():
    case = smooth()
    for one, other in zip(*[with_gradients(case, contrast="sparse") for _ in range(2)], strict=True):
        assert torch.equal(one, other)


def test_sums_in_sorted_runs_are_those_of_a_cpu(monkeypatch):
    """What devices other than CPUs do with the gradients of candidates."""
    case = doubled(smooth())
    expected, seen, runs = with_gradients(case, contrast="sparse"), [], sparse._add_runs
    monkeypatch.setattr(sparse, "_add_rows", lambda *args: seen.append(runs(*args)))
    for one, other in zip(with_gradients(case, contrast="sparse"), expected, strict=True):
        torch.testing.assert_close(one, other, **FULL)
    assert seen


@pytest.mark.parametrize("contrast", ["dense", "sparse"])
@pytest.mark.parametrize(
    "path", framework.find_cases(framework.CASES, "hidden_positives.[gt]*"), ids=lambda path: path.stem
)
def test_both_ways_replay_the_authors(path, contrast, monkeypatch):
    """`make reference` goes the way that counts less; here each is made to."""
    words = replayed._words
    monkeypatch.setattr(replayed, "_words", lambda case: [*words(case), f"method.contrast={contrast}"])
    forced = functools.partial(ghp_contrastive, contrast=contrast)
    monkeypatch.setattr(contrastive, "ghp_contrastive", forced)
    line = framework.replay(path, framework.load_table())
    assert line.status == "ok", line


# ---------------------------------------------------------------- which way


def chosen(case, **settings):
    lines = []
    call(case, chosen=lines.append, **settings)
    return lines


def test_the_way_is_told_and_forced():
    case = smooth()
    assert chosen(case, contrast="dense")[0].startswith("dense: ")
    assert chosen(case, contrast="sparse")[0].startswith("sparse: ")
    assert chosen(case, contrast="auto", candidates=None)[0].startswith("dense: ")


def test_counted_work_decides():
    few, many = smooth(rho=0.01), smooth(rho=0.9)
    assert chosen(few)[0].startswith("sparse: ")
    assert chosen(many)[0].startswith("dense: ")


def test_too_many_positives_make_it_dense(monkeypatch):
    """Where every patch is a positive of every other, and where the list of pairs would fill the memory."""
    case = smooth(rho=0.01)
    everyone = case | {"threshold_ag": torch.full_like(case["threshold_ag"], -2.0)}
    assert chosen(everyone)[0].startswith("dense: ")
    monkeypatch.setitem(work._MEMORY, "cpu", 1000)
    assert chosen(case)[0].startswith("dense: ")


def test_the_search_ends_at_the_number_of_pairs_it_may_find():
    case = smooth()
    kinds, anchors = [(case["f"], case["threshold_ag"])], slice(0, len(case["f"]))
    count = len(pairs.find_pairs(kinds, anchors, True, half=False).first)
    assert count == positive_mask(case["f"], case["threshold_ag"], anchors).sum() / 2
    assert pairs.find_pairs(kinds, anchors, True, half=False, most=count) is not None
    assert pairs.find_pairs(kinds, anchors, True, half=False, most=count - 1) is None


def test_float16_codes_go_the_sparse_way_too():
    case = smooth()
    z = case["z"].half().requires_grad_()
    call(case | {"z": z}, contrast="sparse").backward()
    expected = case["z"].half().float().requires_grad_()
    call(case | {"z": expected}, contrast="sparse").backward()
    assert z.grad.dtype == torch.float16
    assert torch.equal(z.grad, expected.grad.half())


def test_no_gradient_is_computed_where_none_is_asked_for():
    case = scene()
    with torch.no_grad():
        loss = ghp_contrastive(
            *(case[name] for name in ("z", "z_mix", "f", "s_ema", "threshold_ag", "threshold_sp")),
            cells=12, temperature=0.6, lam=0.4, candidates=case["candidates"], contrast="sparse",
        )  # fmt: skip
    torch.testing.assert_close(loss, with_gradients(case, contrast="dense")[0])
