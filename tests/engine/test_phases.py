"""Phases of a run: which steps they have, what may change, and that a run goes on inside any of them."""

from pathlib import Path

import pytest
import torch

import config
from common.errors import CheckpointError, ConfigError, DataError
from engine import evaluating, phases, training
from engine.callbacks.run_keeper import RunKeeper
from lightning_modules.segsort import SegSort
from tests.conftest import Run, run_small, small_words
from tests.test_ddp import expect_equal, expect_equal_losses, run_two

TWO = (
    "phases=[{share: 5, method.kappa: 5, data.batch_size: 4}, "
    "{share: 3, method.views: 1, data.batch_size: 2, optim.head.lr: 0.01}]"
)
SHORT = ["evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]


def run(parent: Path, name: str, *more: str) -> Run:
    """A small run that leaves the size of batches to its phases."""
    return train_with(parent, name, TWO, *more)


def train_with(parent: Path, name: str, phases: str, *more: str) -> Run:
    words = small_words("segsort", f"run.dir={parent}", f"run.name={name}", *SHORT, phases, *more)
    metrics = training.train(config.compose([word for word in words if not word.startswith("data.batch_size")]))
    return Run(parent / name, metrics)


def plan(word: str, total: int) -> list[tuple]:
    cfg = config.compose(small_words("segsort", word))
    return [(phase.first, phase.last, phase.cfg.method.kappa) for phase in phases.plan(cfg, total)]


def test_steps_are_shared_out():
    assert plan("phases=[]", 7) == [(0, 7, 10.0)]
    assert plan(TWO, 8) == [(0, 5, 5.0), (5, 8, 10.0)]
    assert plan("phases=[{share: 350000, method: {kappa: 16}}, {share: 20000}]", 370000) == [
        (0, 350000, 16.0), (350000, 370000, 10.0),
    ]  # fmt: skip
    assert plan("phases=[{share: 9, method.kappa: 5}, {share: 1}]", 1) == [(0, 1, 10.0)]  # too short for a step
    steps = phases.plan(config.compose(small_words("segsort", TWO)), 8)
    assert [phases.at(steps, step) is steps[0] for step in (0, 1, 5, 6, 8)] == [True, True, True, False, False]
    assert [len(phases.left(steps, step)) for step in (0, 4, 5, 8)] == [2, 2, 1, 1]


def test_the_command_line_wins_over_a_phase():
    cfg = config.compose(small_words("segsort", TWO, "method.kappa=7"))
    assert [phase.cfg.method.kappa for phase in phases.plan(cfg, 8)] == [7.0, 7.0]


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("3", "phases: phase 1 is 3, expected keys as in {share: 1, method.kappa: 16}"),
        ("{share: 0}", "phases: share=0 of phase 1: must be a number above 0"),
        ("{seed: 3}", "phases: seed of phase 1: only method., optim., data. keys may change"),
        ("{method.kapa: 3}", "method.kapa: no such key; did you mean method.kappa?"),
        ("{method.kappa: x}", "phases: phase 1: method.kappa=x: expected a number, got a text"),
    ],
)
def test_what_is_refused(phase, message):
    with pytest.raises(ConfigError) as caught:
        config.compose(small_words("segsort", f"phases=[{phase}]"))
    assert str(caught.value) == message


@pytest.mark.train
def test_a_phase_may_not_change_a_size(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("segsort", tmp_path, "x", "phases=[{share: 1}, {share: 1, method.head.kind: pyramid}]")
    assert str(caught.value) == (
        "phases: settings of phase 2 change the shape of head.0.weight, and a phase goes on with the weights of the "
        "one before; leave sizes as they are"
    )


class StopError(Exception):
    """Stands for a kill."""


@pytest.mark.train
@pytest.mark.parametrize("at", [4, 6, 8])
def test_a_run_goes_on_inside_any_phase(at, plain, tmp_path, monkeypatch):
    """Killed at step 4 (saved: 3), 6 (saved: 5, the end of the first phase) and 8 (saved: 6)."""
    end = RunKeeper.on_train_batch_end

    def dies(self, trainer, *rest):
        if trainer.global_step == at:
            raise StopError
        end(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "on_train_batch_end", dies)
        with pytest.raises(StopError):
            run(tmp_path, "killed")
    resumed = run(tmp_path, "killed")
    for name, value in plain[0].weights.items():
        assert torch.equal(value, resumed.weights[name]), name
    assert (resumed.folder / "metrics.csv").read_text() == (plain[0].folder / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Run, list]:
    """The run without a break, and what its steps saw."""
    seen, loss = [], SegSort.loss

    def spy(self, views, features):
        group = next(group for group in self.optimizers().optimizer.param_groups if group["name"] == "head")
        seen.append((self.cfg.method.kappa, len(self.views), len(views["index"]), group["lr"]))
        return loss(self, views, features)

    SegSort.loss = spy
    try:
        return run(tmp_path_factory.mktemp("plain"), "p"), seen
    finally:
        SegSort.loss = loss


@pytest.mark.train
def test_every_phase_has_its_settings_and_schedules(plain):
    found, seen = plain
    assert [step[:3] for step in seen] == [(5.0, 2, 4)] * 5 + [(10.0, 1, 2)] * 3
    rates = [step[3] for step in seen]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[5] == pytest.approx(1e-2)
    assert rates[:5] == sorted(rates[:5], reverse=True)
    assert rates[7] == pytest.approx(1e-2 * (1 / 3) ** 0.9)
    assert found.metrics["steps"] == 8
    (timed,) = (
        state["timed_pictures"] for state in found.checkpoint["callbacks"].values() if "timed_pictures" in state
    )
    assert timed == 4 * 4 + 2 * 2  # the first step of a phase waits for its preparation
    assert found.checkpoint["labelfree"]["config"]["method"]["views"] == 1
    metrics = evaluating.evaluate(found.folder / "checkpoints" / "last.ckpt", [])
    assert metrics["val/kmeans/miou"] == found.metrics["val/kmeans/miou"]
    again = [f"run.resume={found.folder}/checkpoints/last.ckpt", "trainer.max_steps=10", "method.kappa=12"]
    with pytest.raises(CheckpointError, match=r"first difference method\.kappa \(10\.0 -> 12\.0\)"):
        run(found.folder.parent, "other", *again)


@pytest.mark.ddp
def test_two_processes_go_through_the_phases_of_one(tmp_path):
    words = "phases=[{share: 5, method.kappa: 5}, {share: 3, method.views: 1, optim.head.lr: 0.01}]"
    one, folder = run_small("segsort", tmp_path, "one", words), run_two("segsort", tmp_path, words)
    expect_equal(folder, one)
    expect_equal_losses(folder, one)


@pytest.mark.train
def test_a_phase_that_does_not_fit_the_data_ends_before_the_first_step(tmp_path):
    with pytest.raises(DataError) as caught:
        train_with(tmp_path, "x", "phases=[{share: 1, data.batch_size: 4}, {share: 1, data.batch_size: 64}]")
    assert "data.batch_size=64" in str(caught.value)
    assert not (tmp_path / "x" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.train
def test_every_phase_of_a_staged_method_has_its_pseudo_labels(tmp_path):
    phases = "phases=[{share: 5}, {share: 3, optim.head.lr: 1.0e-4}]"
    found = run_small("deep_spectral", tmp_path, "x", "trainer.val_every=100", phases)
    assert found.metrics["steps"] == 8
    assert found.checkpoint["labelfree"]["stage"] is not None
