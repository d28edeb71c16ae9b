"""Losses are float32 inside, whatever their inputs are: counts and sums of Hidden Positives leave float16."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from evaluation.probes import ClusterProbe, LinearProbe
from losses.consistency import consistency
from losses.contrastive import ghp_contrastive, thresholds
from losses.correspondence import alignment, cosines, reconstruction
from losses.crf import crf_matrix
from losses.self_distillation import masked_patch_loss, multi_crop_loss, sinkhorn_targets

CELLS = 300
"""Patches of a picture: 90,000 pairs of positives, and float16 ends at 65504."""


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(draw(count, dim, seed=seed), dim=1)


def contrast(dtype: torch.dtype, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient where every patch is a positive of every other, from rows rounded to float16."""
    z, mix, f, s = (unit(2 * CELLS, 8, seed).half().to(dtype) for seed in range(4))
    z.requires_grad_()
    below = torch.full((2 * CELLS,), -2.0, dtype=dtype)
    settings = {"cells": CELLS, "temperature": temperature, "lam": 0.5, "candidates": None}
    loss = ghp_contrastive(z, mix, f, s, below, below, **settings)
    loss.backward()
    return loss.detach(), z.grad


@pytest.mark.parametrize("temperature", [0.4, 0.07])
def test_sums_of_hidden_positives_do_not_overflow(temperature):
    """Number of positives, weights and denominators are beyond float16; exp(1/0.07) alone is."""
    assert torch.ones(CELLS, CELLS).half().sum().isinf()
    assert torch.tensor(1 / 0.07).half().exp().isinf()
    loss, gradient = contrast(torch.float16, temperature)
    expected, full_gradient = contrast(torch.float32, temperature)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    assert gradient.dtype == torch.float16
    assert torch.equal(gradient, full_gradient.half())
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.equal(contrast(torch.float16, temperature)[0], expected)


def places() -> SimpleNamespace:
    """A view that is the whole picture."""
    return SimpleNamespace(
        boxes=torch.tensor([[0.0, 0.0, 32.0, 32.0]] * 2), flip=torch.tensor([False, True]), source=(32, 32)
    )


LABEL = torch.arange(2 * 16 * 16).reshape(2, 16, 16) % 3
MASK = torch.ones(2, 2, 2, dtype=torch.bool)
TARGETS = torch.softmax(draw(2, 3, 8, seed=5), -1)

LOSSES = {
    "thresholds": lambda a, b: thresholds(F.normalize(a.flatten(2)[0].T, dim=1), F.normalize(b.flatten(2)[0].T, dim=1)),
    "consistency": lambda a, b: consistency(a.flatten(1), b.flatten(1)),
    "cosines": cosines,
    "reconstruction": reconstruction,
    "alignment": lambda a, b: alignment(a, b, places()),
    "crf": lambda a, b: crf_matrix(b[:, :3], a, torch.arange(4), torch.arange(4)),
    "multi_crop": lambda a, b: multi_crop_loss(a.reshape(-1, 3, 8)[:4], TARGETS, 0.1),
    "masked_patches": lambda a, b: masked_patch_loss(a.reshape(-1, 8)[:8], TARGETS.reshape(-1, 8)[[0] * 8], MASK, 0.1),
    "sinkhorn": lambda a, b: sinkhorn_targets(a.reshape(-1, 8), 0.04),
    "cluster_probe": lambda a, b: ClusterProbe(6, 4).loss(a),
    "linear_probe": lambda a, b: LinearProbe(6, 3).loss(a, LABEL),
}
"""Losses of two maps [2,6,4,4]."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_half_precision_inputs_is_that_of_the_same_values_in_float32(name, dtype):
    maps = [draw(2, 6, 4, 4, seed=seed).to(dtype) for seed in (1, 2)]
    if name == "thresholds":  # rows are normalised outside
        maps = [values.float().to(dtype).float() for values in maps]
    expected = LOSSES[name](*(values.float() for values in maps))
    with torch.autocast("cpu", dtype=dtype):
        got = LOSSES[name](*maps)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
