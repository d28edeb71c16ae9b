"""The contrastive loss of HP against its formula written out densely in float64, and the rules it must keep.

Every test is of both ways of computing it.
"""

import pytest
import torch

from common.errors import ConfigError
from losses.contrastive import ghp_contrastive, positive_mask, thresholds
from tests.losses.contrastive import cases
from tests.losses.contrastive.cases import assert_same, call, formula, no_positives, scene, with_gradients


@pytest.fixture(autouse=True, params=["dense", "sparse"])
def way(request, monkeypatch):
    monkeypatch.setattr(cases, "way", request.param)
    return request.param


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
    assert_same(with_gradients(case, **settings), formula(case, **settings))


@pytest.mark.parametrize(("denominator", "pushed"), [("agnostic", True), ("positives", False)])
def test_specific_positives_push_agnostic_ones_away_only_where_the_denominator_leaves_them_out(
    denominator, pushed, way
):
    """One anchor (patch 0 of 8, on an axis) with one TA positive, a TS positive at its place and no candidates."""
    rows = torch.eye(8, dtype=torch.float64)
    f, s_ema = rows.clone(), rows.clone()
    f[1] = s_ema[2] = rows[0]
    limits = torch.full((8,), 0.5, dtype=torch.float64)
    z = torch.nn.functional.normalize(torch.ones(8, 8, dtype=torch.float64) + rows, dim=1).requires_grad_()
    none = torch.zeros(8, 8, dtype=torch.bool)
    ghp_contrastive(
        z,
        None,
        f,
        s_ema,
        limits,
        limits,
        cells=8,
        temperature=0.4,
        lam=1.0,
        candidates=none,
        denominator=denominator,
        contrast=way,
    ).backward()
    towards = -(z.grad[1] @ z.detach()[0])  # what a step down the gradient does to the positive's similarity
    assert (towards < -1e-12) == pushed


def test_float32_is_near_the_dense_formula():
    exact = formula(scene())
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
    both_z = formula(case | {"z_mix": case["z"]}, version=2)
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


def test_a_picture_without_positives_adds_nothing():
    case = no_positives(scene(), slice(0, 12))
    guarded = with_gradients(case)
    assert_same(guarded, formula(case))
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
        ({"contrast": "full"}, ConfigError, "contrast = full: must be one of auto, dense, sparse"),
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
