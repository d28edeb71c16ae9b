"""Counts of a step hold for other batches, and are those of the formulas; docs/scaling.md has the output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks.harness import ROOT
from losses import contrastive

SMALL, DIM, WIDTH = 48, 160, 6
"""Pictures of 6 x 6 patches, and the tiny backbone's features."""


@pytest.fixture(scope="module", params=scaling.RECIPES)
def counts(request) -> tuple[str, list[scaling.Counted]]:
    """A method, and steps of one to three pictures."""
    model = scaling.build(
        request.param,
        [
            f"experiment={scaling.RECIPES[request.param]}",
            "backbone=tiny",
            "backbone.levels=null",
            *(["method.contrast=dense"] if request.param == "hidden_positives" else []),
        ],
    )[0]
    return request.param, [scaling.step(model, pictures, SMALL) for pictures in (1, 2, 3)]


def test_one_and_two_pictures_foretell_three(counts):
    _, (one, two, three) = counts
    assert scaling.scaled(one, two, 3) == three


def test_counts_are_those_of_the_formulas(counts):
    """Of N patches: 12 N^2 D for codes and their gradients, 2 N^2 (C + D) for both kinds of positives; STEGO has no
    term in N^2. A backbone: two views of a picture."""
    method, (one, two, _) = counts
    pairs = (two.rest - 2 * one.rest) / 2
    cells = WIDTH**2
    assert pairs == (scaling.dense_pairs(cells, 512, DIM) if method == "hidden_positives" else 0)
    blocks = 2 * cells * 12 * DIM**2 * 6  # six blocks of 12 D^2 weights; attention and patches come on top
    assert blocks < one.backbone / 2 < 1.1 * blocks
    assert one.images == 2 * 3 * SMALL**2 * 4
    assert one.features == 2 * DIM * cells * 4
    codes = 512 * cells * 4
    if method == "hidden_positives":  # z and z_mix with gradient, the momentum codes without
        assert one.gathered["36 B x 512 float32"] == 3 * codes
        assert one.gathered["36 B x 512 float32, gradient"] == 2 * codes


def test_the_sparse_loss_counts_as_its_formula_says():
    """A real call under the counter, which knows the batched products of candidates and the products of the sieve: the
    first to a few percent (positions of unlike counts are filled up), the second to what blocks on the diagonal add."""
    cells, pictures, dim, channels, rho = 400, 4, 32, 24, 0.1
    total = cells * pictures
    draw = torch.Generator().manual_seed(0)
    z, mix, f, s = (
        torch.nn.functional.normalize(torch.randn(total, width, generator=draw), dim=1)
        for width in (dim, dim, channels, dim)
    )
    limit = torch.full((total,), 0.8)
    settings = {"cells": cells, "temperature": 0.8, "lam": 0.5, "contrast": "sparse", "block_bytes": 1 << 20}
    chosen = contrastive.random_candidates(0, 0, cells, total, rho)
    with scaling.counter() as seen:
        contrastive.ghp_contrastive(
            z.requires_grad_(), mix.requires_grad_(), f, s, limit, limit, candidates=chosen, **settings
        )
    counts = {str(name): value for name, value in seen.get_flop_counts()["Global"].items()}
    formula = scaling.sparse_pairs(total, cells, dim, channels, rho)
    candidates = formula["rest"] - 6 * scaling.POSITIVES * total * dim
    assert counts["aten.bmm"] == pytest.approx(candidates, rel=0.05)
    assert formula["sieve"] < counts["aten.mm"] < formula["sieve"] * (1 + 256 / total) * 1.05


def test_the_sparse_loss_takes_the_place_of_all_pairs():
    dense = scaling.Counted(64, 5e12, scaling.dense_pairs(64 * 9, 8, 4) + 7.0, 0, 0, {}, 0)
    few = scaling.sparse(dense, cells=9, dim=8, channels=4, rho=0.5)
    instead = scaling.sparse_pairs(64 * 9, 9, 8, 4, 0.5)
    assert (few.rest, few.sieve, few.moved) == (7.0 + instead["rest"], instead["sieve"], instead["moved"])
    gpu = scaling.GPU("x", half=4.0, single=2.0, link=1.0, memory=1, half_share=1, single_share=1, bandwidth=8.0,
                      bandwidth_share=0.5)  # fmt: skip
    assert scaling.estimate(few, gpu, 2)["rest"] == pytest.approx((few.rest / 2 + few.sieve / 4 + few.moved / 4) / 2)


def test_an_estimate_adds_up():
    step = scaling.Counted(64, backbone=2e12, rest=1e12, images=0, features=0, gathered={"a": 3e8}, weights=1e8)
    gpu = scaling.GPU(
        "x", half=1e13, single=1e12, link=1e9, memory=1e11, half_share=0.5, single_share=1, link_share=0.5
    )
    assert scaling.estimate(step, gpu, 1) == pytest.approx({"backbone": 0.4, "rest": 1.0, "link": 0.0})
    assert scaling.estimate(step, gpu, 4) == pytest.approx({"backbone": 0.1, "rest": 0.25, "link": 0.75})
    assert scaling.rows_that_fit(gpu, 500, 4) == 25e6


@pytest.mark.train
def test_a_training_is_measured(capsys):
    assert scaling.main(["--quick", "--method", "kmeans_baseline"]) == 0
    row = capsys.readouterr().out.splitlines()[-1].strip("| ").split(" | ")
    assert row[:2] == ["4", "1"]
    assert float(row[2]) > 0
    assert float(row[3]) > 50


def test_batches_that_processes_cannot_share_are_left_out():
    args = type("Args", (), {"method": "m", "batches": [3, 4], "processes": [1, 2], "steps": 2, "threads": 1})
    lines = list(scaling.measure(args, lambda method, batch, processes, *_: (batch * processes, 100)))
    assert lines[2:] == ["| 3 | 1 | 3.0 | 100 |", "| 4 | 1 | 4.0 | 100 |", "| 4 | 2 | 8.0 | 100 |"]


@pytest.mark.slow
def test_the_tables_of_the_document_are_the_output():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", "--count"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.partition("\n\n")[2].strip() in (Path(ROOT) / "docs" / "scaling.md").read_text()
