"""Dropout and stochastic depth that a library draws: a run that goes on drops what it would have dropped."""

from types import SimpleNamespace

import pytest
import torch

from engine.callbacks.library_draws import LibraryDraws
from engine.callbacks.run_keeper import RunKeeper
from tests.conftest import Run, run_small

TRAINED = [
    "backbone=mobilenetv2", "backbone.weights=none", "backbone.frozen=false", "backbone.levels=[1,3]",
    "backbone.freeze_norms=false",
]  # fmt: skip


class StopError(Exception):
    """Stands for a kill."""


def drawn(seed: int, step: int, rank: int) -> float:
    LibraryDraws(seed).on_train_batch_start(SimpleNamespace(global_step=step, global_rank=rank))
    return float(torch.rand(()))


def test_draws_belong_to_seed_step_and_rank():
    plain = drawn(0, 3, 0)
    torch.rand(7)
    assert drawn(0, 3, 0) == plain
    assert len({plain, drawn(1, 3, 0), drawn(0, 4, 0), drawn(0, 3, 1)}) == 4


@pytest.mark.train
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("deep_spectral", ["method.head.dropout=0.5"]),
        ("dino", ["method.drop_path=0.5"]),
        ("maskcontrast", [*TRAINED, "method.head.norm=batch", "method.head.dropout=0.5"]),
    ],
)
def test_a_killed_run_with_dropout_goes_on_to_the_same_weights(method, words, tmp_path, monkeypatch):
    """Killed at step 7, inside the second epoch and after a validation; saved: 6. MaskContrast trains its network, with
    batch norms that are not held."""
    words = [*words, "evaluation.panels=0"]
    plain = run_small(method, tmp_path, "plain", *words)
    killed(monkeypatch, 7, method, tmp_path, words)
    same_weights(plain, run_small(method, tmp_path, "killed", *words))


def killed(monkeypatch, step: int, method: str, parent, words: list[str]) -> None:
    """A run that dies in a step, before anything of it is kept."""
    end = RunKeeper.on_train_batch_end

    def dies(self, trainer, *rest):
        if trainer.global_step == step:
            raise StopError
        end(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "on_train_batch_end", dies)
        with pytest.raises(StopError):
            run_small(method, parent, "killed", *words)


def same_weights(one: Run, two: Run) -> None:
    weights = two.weights
    for name, value in one.weights.items():
        assert torch.equal(value, weights[name]), name
