"""Position embeddings: the released rules, prefix rows, and what the two rules must not share."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers import resample_abs_pos_embed

from common.errors import ConfigError
from models.vit import positions
from tests.reference import backbones

CASES = sorted((Path(__file__).parents[2] / "reference" / "cases").glob("backbones.pos_embed.*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_authors_numbers(path):
    case = dict(np.load(path))
    results = backbones.pos_embed({key: value for key, value in case.items() if not key.startswith("out_")})
    assert set(results) == {key for key in case if key.startswith("out_")}
    for key, result in results.items():
        np.testing.assert_allclose(result, case[key], rtol=1e-5, atol=1e-5)


def test_cases_are_there():
    assert CASES


@pytest.mark.parametrize("grid", [(7, 5), (3, 4), (12, 3)])
def test_timm_rule_is_timms(grid):
    embedding = torch.randn(1, 2 + 6 * 4, 8)
    expected = resample_abs_pos_embed(embedding, grid, (6, 4), num_prefix_tokens=2)
    assert torch.equal(positions.resample(embedding, (6, 4), grid, 2, "timm"), expected)


@pytest.mark.parametrize("rule", positions.RULES)
def test_native_grid_and_prefix_are_untouched(rule):
    embedding = torch.randn(1, 1 + 36, 8)
    assert positions.resample(embedding, (6, 6), (6, 6), 1, rule) is embedding
    resampled = positions.resample(embedding, (6, 6), (9, 4), 1, rule)  # as many patches, another shape
    assert torch.equal(resampled[:, :1], embedding[:, :1])
    assert not torch.allclose(resampled, embedding)


@pytest.mark.parametrize("rule", positions.RULES)
def test_axes_are_not_swapped(rule):
    rows = torch.arange(6.0).repeat_interleave(6).reshape(1, 36, 1)  # grows downwards, constant along a row
    resampled = positions.resample(rows, (6, 6), (12, 3), 0, rule).reshape(12, 3)
    assert (resampled.diff(dim=0) > -1e-4).all()
    assert torch.allclose(resampled[:, :1].expand(-1, 3), resampled, atol=1e-5)


def test_rules_differ_by_percents():
    smooth = torch.linspace(0, 6, 14).sin()
    embedding = (smooth[:, None] + smooth.cos()[None]).reshape(1, 196, 1)
    dino, timm = (positions.resample(embedding, (14, 14), (20, 20), 0, rule) for rule in ("dino", "timm"))
    assert 0.005 < ((dino - timm).norm() / timm.norm()).item() < 0.2


def test_gradient_flows_to_the_embedding():
    embedding = torch.randn(1, 1 + 16, 4, requires_grad=True)
    positions.resample(embedding, (4, 4), (6, 5), 1, "dino").sum().backward()
    assert (embedding.grad != 0).any()


def test_half_precision_stays_half():
    embedding = torch.randn(1, 16, 4, dtype=torch.float16)
    assert positions.resample(embedding, (4, 4), (6, 5), 0, "dino").dtype == torch.float16


def test_errors():
    with pytest.raises(ConfigError) as error:
        positions.resample(torch.zeros(1, 17, 4), (4, 4), (5, 5), 1, "mae")
    assert str(error.value) == "backbone.pos_interp=mae: not one of dino, timm"
    with pytest.raises(ValueError, match="18 rows are not 1 prefix rows and a grid of 4 x 4"):
        positions.resample(torch.zeros(1, 18, 4), (4, 4), (5, 5), 1, "timm")


@pytest.mark.parametrize(("rows", "expected"), [(197, (1, 14)), (196, (0, 14)), (201, (5, 14)), (203, None), (3, None)])
def test_square_grid(rows, expected):
    assert positions.square_grid(rows, (5, 1, 0)) == expected


@pytest.mark.parametrize("grid", [(16, 16), (9, 31), (16, 5), (40, 12)])
def test_the_matrices_of_an_exported_program_are_the_rule_of_dino(grid, monkeypatch):
    embedding = torch.randn(1, 1 + 256, 6, generator=torch.Generator().manual_seed(0))
    expected = positions.resample(embedding, (16, 16), grid, 1, "dino")
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = positions.resample(embedding, (16, 16), grid, 1, "dino")
    assert torch.allclose(found, expected, atol=2e-5)  # values up to 4, bicubic in float32
