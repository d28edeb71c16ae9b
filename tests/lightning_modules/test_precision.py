"""A run in mixed precision follows the float32 one, because what decides stays float32 (common/precision.py)."""

import csv
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lightning_modules import registry
from models.clustering import NodeNorm
from tests.conftest import METHODS, Run, run_small
from tests.support.held_norms import held

pytestmark = pytest.mark.train

BAND = 5e-3
"""Of every training value, relative to the largest of its float32 curve: as much as one rounding to bfloat16 (2^-8 =
0.4 %) and a little. Measured: 0.2 % for dino, whose whole network runs in bfloat16; below 0.1 % for the others."""
HARD = {"train/fine": 0.15, "train/coarse": 0.15, "train/modularity": 1e-3, "train/information": 1e-3}
"""Bands of the first step alone. Values that follow hard labels of groups: from then on single segments near the border
of two groups have changed sides. Measured: 7 %. CAUSE's modularity is later that of prototypes, which begin with a
k-means of codes and may begin with another one. Information grows fast from random weights, and every rounding with it:
0.02 % of the most at first, 9 % from the fourth step on."""
BANDS = {
    "segsort": 2.5e-2,
    "stego": 1e-2,
    "deep_spectral": 1e-2,
    "hsg": 0.12,
    "smooseg": 1e-2,
    "eagle": 0.1,
    "context_prediction": 8e-2,
    "cooccurrence": 4e-2,
    "autoregressive": 2e-2,
    "iic": 6e-2,
    "slotcon": 8e-2,
}
"""Measured of the cluster probe, whose patches near the border of two clusters change sides: segsort 1.8 % (0.2 % of
the rest; backbone and head are trained, and their codes are short), stego 0.6 % (its codes are nearly one here),
deep_spectral 0.1 to 0.7 % (by the kind of processor: products in bfloat16 are summed in another order). hsg:
all hangs on hard groups; 0.8 % of the whole loss and 2 % of its centroids for five steps, 5 and 10 % later, with norms
held (held_norms.py). smooseg: below 0.1 %, but for the share of patches that student and teacher agree on, where one of
the 144 is 0.7 %. eagle: 0.4 % but for what hangs on the segments, whose border patches change sides: 7 % of the object
losses, 2 % of the whole. context_prediction and cooccurrence: 0.05 % at the first step, later up to 2 %, and 4 % of the
probability of a direction: the whole network is trained from random weights, by steps of Adam that are as large for a
small gradient, on four pairs a step. autoregressive: 0.5 % of an information that is 0.05 % of its most yet. iic:
below 0.1 % at first, and 3 % of its loss from the fourth step on, as its information. slotcon: 0.5 % but for which
slots both crops show, which single pixels near the border of two prototypes decide: 4 % of a small batch's anchors, and
1.4 % of their contrast."""
BANDS |= dict.fromkeys(("picie", "mdc"), 0.1)
"""Their clusters begin with a k-means of codes, which ends elsewhere for others: 2 % of the losses, 7 % of the clusters
in use."""

BANDS["leopart"] = 0.01
"""0.55 % of the loss of the cluster probe, whose codes are of trained blocks; below 0.5 % of its own losses."""

BANDS["cutler"] = 0.5
"""Which boxes its losses are of follows which proposals stay, and its stage trains a detector before: 11 % of the whole
loss, 34 % of that of the few boxes that hold an object."""

EXACT = ("primaps",)
"""Methods that train prototypes alone, which are float32 in every precision."""


@pytest.fixture(scope="module")
def mixed_run(tmp_path_factory) -> Callable[[str], Run]:
    """The small run of a method under bf16-mixed."""
    done: dict[str, Run] = {}

    def get(method: str) -> Run:
        if method not in done:
            parent = tmp_path_factory.mktemp("mixed")
            done[method] = run_small(method, parent, method, "trainer.precision=bf16-mixed")
        return done[method]

    return get


def curves(run: Run) -> dict[str, list[float]]:
    """The training values by name, step by step; a phase need not have all of them."""
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["train/cluster_probe"]]
    return {key: [float(row[key]) for row in rows if row[key]] for key in rows[0] if key.startswith("train/")}


@pytest.fixture
def both_runs(small_run, mixed_run, tmp_path, monkeypatch) -> Callable[[str], tuple[Run, Run]]:
    """The small run of a method in float32, and under bf16-mixed."""

    def get(method: str) -> tuple[Run, Run]:
        if method != "hsg":
            return small_run(method), mixed_run(method)
        monkeypatch.setattr(NodeNorm, "forward", held)
        precisions = ("32-true", "bf16-mixed")
        return tuple(run_small(method, tmp_path, name, f"trainer.precision={name}") for name in precisions)

    return get


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_of_a_bfloat16_run_follow_those_of_a_float32_run(method, both_runs):
    plain, mixed = map(curves, both_runs(method))
    assert plain.keys() == mixed.keys()
    assert len(plain["train/cluster_probe"]) == 8
    for name, values in plain.items():
        assert len(values) == len(mixed[name]) > 0
        steps = 1 if name in HARD else 8
        far = max(abs(one - two) for one, two in zip(values[:steps], mixed[name][:steps], strict=True))
        assert far <= HARD.get(name, BANDS.get(method, BAND)) * max(map(abs, values)), f"{name}: {far:.2g}"
    if registry.method_class(method).trains and method not in EXACT:
        assert any(mixed[name] != plain[name] for name in plain)  # its networks did run in bfloat16
    rounded = torch.tensor(mixed["train/linear_probe"]).bfloat16().float().tolist()
    assert rounded != pytest.approx(mixed["train/linear_probe"], rel=1e-5)  # and its losses did not


def tensors(content: Any) -> Iterator[torch.Tensor]:
    if torch.is_tensor(content):
        yield content
    elif isinstance(content, dict | list | tuple):
        for part in content.values() if isinstance(content, dict) else content:
            yield from tensors(part)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_mixed_run_keeps_is_float32(method, mixed_run):
    checkpoint = mixed_run(method).checkpoint
    kept = list(tensors(checkpoint["optimizer_states"])) + list(tensors(checkpoint["state_dict"]))
    assert len(kept) > len(checkpoint["state_dict"])
    assert not {value.dtype for value in kept} & {torch.float16, torch.bfloat16}


def test_float16_on_a_cpu_says_what_is_used(mixed_run, tmp_path, caplog):
    run = run_small("hidden_positives", tmp_path, "x", "trainer.precision=16-mixed")
    assert caplog.messages.count(
        "trainer.precision=16-mixed: float16 training is for GPUs, there is none of it on a CPU; bf16-mixed is used"
    ) == 1  # fmt: skip
    assert curves(run) == curves(mixed_run("hidden_positives"))
