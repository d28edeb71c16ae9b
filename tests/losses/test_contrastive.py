"""The contrastive loss of HP against its formula written out densely in float64, and the rules it must keep."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError
from losses import contrastive
from losses.contrastive import ghp_contrastive, lambda_schedule, positive_mask, random_candidates, thresholds


def scene(pictures=3, cells=12, dim=6, channels=8, pool=4, seed=0, dtype=torch.float64):
    """Smooth random rows with some positives, as the arguments of the loss."""
    generator = torch.Generator().manual_seed(seed)

    def unit(rows, width):
        return F.normalize(torch.randn(rows, width, generator=generator, dtype=torch.float64), dim=1).to(dtype)

    total = pictures * cells
    case = {
        "z": unit(total, dim),
        "z_mix": unit(total, dim),
        "f": unit(total, channels),
        "s_ema": unit(total, dim),
        "pool_ag": unit(pool, channels),
        "pool_sp": unit(pool, dim),
        "candidates": torch.rand(cells, total, generator=generator) < 0.3,
        "cells": cells,
    }
    case["threshold_ag"] = (case["f"] @ case["pool_ag"].T).amax(1)
    case["threshold_sp"] = (case["s_ema"] @ case["pool_sp"].T).amax(1)
    return case


def call(case, **changes):
    names = ("z", "z_mix", "f", "s_ema", "threshold_ag", "threshold_sp")
    settings = {"cells": case["cells"], "candidates": case["candidates"], "temperature": 0.6, "lam": 0.4} | changes
    positional = [settings.pop(name, case[name]) for name in names]
    return ghp_contrastive(*positional, **settings)


def with_gradients(case, **changes):
    sides = [case[name].clone().requires_grad_() for name in ("z", "z_mix")]
    loss = call(case | {"z": sides[0], "z_mix": sides[1]}, **changes)
    loss.backward()
    return loss.detach(), *[side.grad for side in sides]


def dense(
    case, *, lam=0.4, temperature=0.6, reweighting=True, version=1, symmetric=True, candidates="case",
    denominator="agnostic",
):  # fmt: skip
    """The formula of the paper and its release, with N x N matrices and autograd (all anchors filled)."""
    total, cells = len(case["z"]), case["cells"]
    off_diagonal = ~torch.eye(total, dtype=torch.bool)

    def mask(rows, threshold):
        similarity = rows @ rows.T
        above = similarity > threshold[:, None]
        return (above | (similarity > threshold[None, :]) if symmetric else above) & off_diagonal

    ag, sp = mask(case["f"], case["threshold_ag"]), mask(case["s_ema"], case["threshold_sp"])
    chosen = case["candidates"] if candidates == "case" else torch.ones(cells, total, dtype=torch.bool)
    inside = (ag | chosen.repeat(total // cells, 1)) & off_diagonal
    inside = inside | sp if denominator == "positives" else inside
    sides = [case["z"].clone().requires_grad_(), case["z_mix"].clone().requires_grad_()]

    def mean_over_anchors(log_p, weights, kept):
        anchors = [i for i in range(total) if kept[i]]
        losses = []
        for picture in range(total // cells):
            own = [i for i in anchors if i // cells == picture]
            if not own:
                continue
            k = weights[own].sum(1)
            each = -(temperature / 0.07) * (weights[own] * log_p[own]).sum(1) / k
            losses.append((each * k / k.mean() if reweighting else each).mean())
        return sum(losses) if losses else sides[0].sum() * 0

    loss = 0
    for side in sides:
        scores = side @ side.T / temperature
        log_p = scores - torch.log((scores.exp() * inside).sum(1, keepdim=True))
        if version == 1:
            loss = loss + mean_over_anchors(log_p, ag.double() + lam * sp.double(), ag.any(1))
        else:
            loss = loss + mean_over_anchors(log_p, ag.double(), ag.any(1))
            loss = loss + lam * mean_over_anchors(log_p, sp.double(), sp.any(1))
    loss = loss / (2 * (total // cells))
    loss.backward()
    return loss.detach(), sides[0].grad, sides[1].grad


def assert_same(got, expected, rtol=1e-9, atol=1e-11):
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lam": 0.0},
        {"lam": 1.0, "temperature": 0.1},
        {"reweighting": False},
        {"symmetric": False},
        {"candidates": None},
        {"version": "2-fixed"},
        {"version": "2-fixed", "reweighting": False},
        {"denominator": "positives"},
        {"denominator": "positives", "version": "2-fixed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pictures", [1, 3])
def test_equals_the_dense_formula_with_its_gradients(settings, pictures):
    case = scene(pictures=pictures)
    assert_same(with_gradients(case, **settings), dense(case, **settings))


@pytest.mark.parametrize(("denominator", "pushed"), [("agnostic", True), ("positives", False)])
def test_specific_positives_push_agnostic_ones_away_only_where_the_denominator_leaves_them_out(denominator, pushed):
    """One anchor (patch 0 of 8, on an axis) with one TA positive, a TS positive at its place and no candidates."""
    rows = torch.eye(8, dtype=torch.float64)
    f, s_ema = rows.clone(), rows.clone()
    f[1] = s_ema[2] = rows[0]
    limits = torch.full((8,), 0.5, dtype=torch.float64)
    z = torch.nn.functional.normalize(torch.ones(8, 8, dtype=torch.float64) + rows, dim=1).requires_grad_()
    none = torch.zeros(8, 8, dtype=torch.bool)
    ghp_contrastive(
        z, None, f, s_ema, limits, limits, cells=8, temperature=0.4, lam=1.0, candidates=none, denominator=denominator
    ).backward()
    towards = -(z.grad[1] @ z.detach()[0])  # what a step down the gradient does to the positive's similarity
    assert (towards < 0) == pushed


def test_float32_is_near_the_dense_formula():
    exact = dense(scene())
    case = {name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in scene().items()}  # fmt: skip
    assert_same(with_gradients(case), exact, rtol=1e-5, atol=1e-6)


def test_gradient_agrees_with_finite_differences():
    case = scene(pictures=2, cells=5)
    z, z_mix = (case[name].clone().requires_grad_() for name in ("z", "z_mix"))
    assert torch.autograd.gradcheck(lambda a, b: 3 * call(case | {"z": a, "z_mix": b}), (z, z_mix))


@pytest.mark.parametrize("version", [1, 2, "2-fixed"])
def test_block_size_does_not_matter(version):
    case = scene()
    whole = with_gradients(case, version=version)
    smallest = with_gradients(case, version=version, block_bytes=1)
    uneven = with_gradients(case, version=version, block_bytes=3 * 8 * 36 * 5)
    for other in (smallest, uneven):
        for one, two in zip(whole, other, strict=True):
            assert (one is None and two is None) or torch.allclose(one, two, rtol=1e-10, atol=1e-12)


def test_slices_of_pictures_sum_to_the_whole():
    case = scene(pictures=4)
    whole = with_gradients(case)
    parts = [with_gradients(case, pictures=(first, 2)) for first in (0, 2)]
    assert_same([(a + b) / 2 for a, b in zip(*parts, strict=True)], whole)


def test_version_2_as_released_reads_z_twice():
    case = scene()
    loss, grad, grad_mix = with_gradients(case, version=2)
    assert grad_mix is None
    both_z = dense(case | {"z_mix": case["z"]}, version=2)
    torch.testing.assert_close(loss, both_z[0])
    torch.testing.assert_close(grad, both_z[1] + both_z[2])
    assert not torch.isclose(loss, with_gradients(case, version="2-fixed")[0])


def test_without_local_positives_the_divisor_is_the_number_of_pictures():
    case = scene()
    torch.testing.assert_close(call(case, z_mix=None), call(case | {"z_mix": case["z"]}))


def test_ablations_all_differ():
    case = scene()
    losses = [
        call(case),
        call(case, s_ema=None, threshold_sp=None),
        call(case, f=None, threshold_ag=None),
        call(case, symmetric=False),
        call(case, z_mix=None),
    ]
    assert len({round(loss.item(), 9) for loss in losses}) == len(losses)


def test_without_task_specific_positives_equals_lambda_zero():
    case = scene()
    assert_same(with_gradients(case, s_ema=None, threshold_sp=None), with_gradients(case, lam=0.0), rtol=0, atol=0)


def test_without_task_agnostic_positives_the_specific_ones_take_their_place():
    case = scene()
    swapped = case | {"f": case["s_ema"], "threshold_ag": case["threshold_sp"]}
    expected = call(swapped, s_ema=None, threshold_sp=None)
    torch.testing.assert_close(call(case, f=None, threshold_ag=None, lam=0.25), 0.25 * expected)


def no_positives(case, rows, candidates_too=False):
    """The case with nothing similar to the given rows; with empty denominators on request."""
    f, threshold, candidates = case["f"].clone(), case["threshold_ag"].clone(), case["candidates"].clone()
    f[rows] = 0.0
    threshold[rows] = 2.0
    threshold = threshold.clamp_min(1e-3)
    if candidates_too:
        candidates[rows] = False
    return case | {"f": f, "threshold_ag": threshold, "candidates": candidates}


def test_a_picture_without_positives_adds_nothing():
    case = no_positives(scene(), slice(0, 12))
    guarded = with_gradients(case)
    assert_same(guarded, dense(case))
    loss, *grads = with_gradients(case, guarded=False)
    assert loss.isnan()
    assert_same(grads, guarded[1:])  # the mean of an empty selection passes no gradient on


def test_no_positives_at_all():
    case = no_positives(scene(), slice(0, 36))
    loss, *grads = with_gradients(case)
    assert loss == 0
    assert all((grad == 0).all() for grad in grads)


def test_an_empty_denominator_spoils_gradients_only_as_released():
    case = no_positives(scene(), slice(3, 4), candidates_too=True)
    guarded = with_gradients(case)
    assert all(value.isfinite().all() for value in guarded)
    loss, *grads = with_gradients(case, guarded=False)
    torch.testing.assert_close(loss, guarded[0])
    assert all(grad.isnan().all() for grad in grads)


def test_empty_denominators_of_task_specific_anchors_are_guarded_in_version_2():
    case = no_positives(scene(), slice(3, 4), candidates_too=True)
    assert positive_mask(case["s_ema"], case["threshold_sp"], slice(3, 4)).any()
    assert all(value.isfinite().all() for value in with_gradients(case, version="2-fixed"))


def test_only_z_and_z_mix_get_gradient():
    case = scene()
    case["f"].requires_grad_()
    case["s_ema"].requires_grad_()
    call(case | {"z": case["z"].requires_grad_()}).backward()
    assert case["f"].grad is None
    assert case["s_ema"].grad is None
    assert case["z"].grad.abs().sum() > 0


def test_no_gradient_is_kept_where_none_is_asked_for():
    case = scene()
    with torch.no_grad():
        loss = call(case | {"z": case["z"].requires_grad_()})
    assert not loss.requires_grad
    torch.testing.assert_close(loss, call(case).detach())


def test_inside_autocast_the_loss_is_float32():
    case = {name: value.float() if torch.is_tensor(value) and value.is_floating_point() else value
            for name, value in scene().items()}  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = call(case)
        limits = thresholds(case["f"], case["pool_ag"])
    assert inside.dtype == torch.float32
    assert torch.equal(inside, call(case))
    assert torch.equal(limits, thresholds(case["f"], case["pool_ag"]))


def test_half_precision_codes_get_gradients_of_their_own_type():
    case = scene(dtype=torch.float32)
    z = case["z"].to(torch.bfloat16).requires_grad_()
    call(case | {"z": z}).backward()
    assert z.grad.dtype == torch.bfloat16
    assert z.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["z_mix", "f", "s_ema", "threshold_ag", "pool_ag"])
def test_arguments_may_differ_in_precision(name):
    case = scene()
    mixed = case | {name: case[name].float()}
    mixed["threshold_ag"] = thresholds(case["f"], mixed["pool_ag"]) if name == "pool_ag" else mixed["threshold_ag"]
    torch.testing.assert_close(call(mixed), call(case), rtol=1e-5, atol=1e-6)


def test_positives_are_symmetric_and_never_the_anchor():
    case = scene()
    mask = positive_mask(case["f"], case["threshold_ag"], slice(0, 36))
    assert mask.any()
    assert torch.equal(mask, mask.T)
    assert not mask.diagonal().any()
    one_way = positive_mask(case["f"], case["threshold_ag"], slice(0, 36), symmetric=False)
    assert torch.equal(mask, one_way | one_way.T)
    assert not torch.equal(mask, one_way)


def test_the_comparison_is_strict():
    rows = torch.eye(3)[[0, 0, 1]]
    at_one = positive_mask(rows, torch.ones(3), slice(0, 3))
    assert not at_one.any()
    below = positive_mask(rows, torch.tensor([0.5, 1.0, 1.0]), slice(0, 3))
    assert below.nonzero().tolist() == [[0, 1], [1, 0]]


def test_the_order_of_the_pool_does_not_matter_and_a_new_entry_adds_no_positive():
    case = scene()
    limit = thresholds(case["f"], case["pool_ag"])
    torch.testing.assert_close(limit, case["threshold_ag"])
    assert torch.equal(thresholds(case["f"], case["pool_ag"].flip(0)), limit)
    larger = thresholds(case["f"], torch.cat([case["pool_ag"], case["s_ema"].new_tensor([[1.0] + [0.0] * 7])]))
    before, after = (positive_mask(case["f"], threshold, slice(0, 36)) for threshold in (limit, larger))
    assert not (after & ~before).any()
    assert after.sum() < before.sum()


def test_threshold_blocks_do_not_matter(monkeypatch):
    case = scene()
    whole = thresholds(case["f"], case["pool_ag"])
    monkeypatch.setitem(contrastive._BLOCK_BYTES, "cpu", 1)
    monkeypatch.setattr(contrastive, "_MIN_ANCHORS", 5)
    torch.testing.assert_close(thresholds(case["f"], case["pool_ag"]), whole)


def test_candidates_are_keyed_and_have_their_share():
    first = random_candidates(0, 7, 784, 1568, 0.02)
    assert torch.equal(first, random_candidates(0, 7, 784, 1568, 0.02))
    assert not torch.equal(first, random_candidates(0, 8, 784, 1568, 0.02))
    assert not torch.equal(first, random_candidates(1, 7, 784, 1568, 0.02))
    assert first.double().mean().item() == pytest.approx(0.02, abs=0.001)
    assert random_candidates(0, 7, 4, 8, 1.0) is None
    assert not random_candidates(0, 7, 4, 8, 0.0).any()


def test_lambda_grows_after_the_warm_up():
    assert [lambda_schedule(step, 2, 6) for step in range(7)] == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75, 1.0]
    assert np.isclose(lambda_schedule(1001, 1000, 22896), 1 / 21896, rtol=1e-15)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"f": None, "threshold_ag": None, "s_ema": None, "threshold_sp": None},
            ConfigError,
            "hidden positives: task-agnostic and task-specific positives are both off; switch one on",
        ),
        ({"temperature": 0.01}, ConfigError, "temperature = 0.01: must be at least 0.02"),
        ({"version": 3}, ConfigError, "loss version = 3: must be one of 1, 2, 2-fixed"),
        ({"denominator": "all"}, ConfigError, "denominator = all: must be one of agnostic, positives"),
        ({"f": None}, ValueError, "features and their threshold must be given, or left out, together"),
        ({"cells": 7}, ValueError, "36 rows are not a whole number of pictures of 7 patches"),
        (
            {"candidates": torch.ones(12, 12, dtype=torch.bool)},
            ValueError,
            "candidates of shape (12, 12), expected (12, 36)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, text):
    with pytest.raises(error) as caught:
        call(scene(), **change)
    assert str(caught.value) == text


def test_wrong_schedules_and_empty_pools_are_named():
    with pytest.raises(ConfigError) as caught:
        lambda_schedule(11, 10, 10)
    assert str(caught.value) == "lambda schedule: warm-up of 10 steps in a run of 10 steps; the warm-up must be shorter"
    with pytest.raises(ConfigError) as caught:
        thresholds(torch.eye(3), torch.zeros(0, 3))
    assert str(caught.value) == "the reference pool is empty: fill it before the first training step"
