"""Counts of a step hold for other batches, and are those of the formulas; docs/scaling.md has the output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.harness import ROOT

SMALL, DIM, WIDTH = 48, 160, 6
"""Pictures of 6 x 6 patches, and the tiny backbone's features."""


@pytest.fixture(scope="module", params=scaling.RECIPES)
def counts(request) -> tuple[str, list[scaling.Counted]]:
    """A method, and steps of one to three pictures."""
    model = scaling.build(
        request.param, [f"experiment={scaling.RECIPES[request.param]}", "backbone=tiny", "backbone.levels=null"]
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
    assert pairs == (12 * cells**2 * 512 + 2 * cells**2 * (DIM + 512) if method == "hidden_positives" else 0)
    blocks = 2 * cells * 12 * DIM**2 * 6  # six blocks of 12 D^2 weights; attention and patches come on top
    assert blocks < one.backbone / 2 < 1.1 * blocks
    assert one.images == 2 * 3 * SMALL**2 * 4
    assert one.features == 2 * DIM * cells * 4
    codes = 512 * cells * 4
    if method == "hidden_positives":  # z and z_mix with gradient, the momentum codes without
        assert one.gathered["36 B x 512 float32"] == 3 * codes
        assert one.gathered["36 B x 512 float32, gradient"] == 2 * codes


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
