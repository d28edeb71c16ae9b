"""Rounds of clustering: what labels a batch, what weighs a cluster, and what a killed run goes on with."""

import pytest
import torch

import config
from common.errors import ConfigError
from engine import evaluating, setup
from engine.callbacks.run_keeper import RunKeeper
from lightning_modules.clustered.rounds import ClusterRounds
from tests.conftest import run_small, small_words

QUICK = ["evaluation.panels=0", "evaluation.kmeans.pictures=4", "trainer.val_every=100"]


def model_of(method: str, *more: str) -> ClusterRounds:
    return setup.build_model(config.compose(small_words(method, "method.num_clusters=6", *more)), setup.ClassMeta())


def batch(model: ClusterRounds, count: int = 2) -> dict[str, torch.Tensor]:
    """Pictures [B,3,48,48] of every view, uncropped."""
    draw = torch.Generator().manual_seed(0)
    return {name: torch.rand(count, 3, 48, 48, generator=draw) for name in ("view1", "view2")}


def test_labels_are_those_of_the_copy_not_of_the_network_that_trains():
    model = model_of("mdc").train()
    assert not model.labeller.training
    assert not any(parameter.requires_grad for parameter in model.labeller.parameters())
    half = torch.randn(1, 3, model.code_dim, generator=torch.Generator().manual_seed(0))
    model.centroids0.copy_(torch.cat([half, -half], dim=1))  # a code that is turned round goes to the other of a pair
    views = batch(model)
    before = model.labels_of(views, 0)[0]
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(1)
        for parameter in model.head.parameters():
            parameter.neg_()
    assert torch.equal(model.labels_of(views, 0)[0], before)
    model.labeller["head"].load_state_dict(model.head.state_dict())
    assert torch.equal(model.labels_of(views, 0)[0], (before + 3) % 6)


@pytest.mark.train
def test_a_round_counts_the_labels_it_gives_and_stands_in_the_checkpoint(tmp_path):
    """The second epoch begins at step 5: its round is that of the run's end, though killed inside it (test_methods)."""
    run = run_small("picie", tmp_path, "x", *QUICK, "trainer.max_steps=6", "method.kmeans.counted=null")
    weights = run.weights
    assert int(weights["round"]) == 1
    cells = 22 * 6 * 6  # pictures of 48 px in patches of 8
    assert weights["counts0"].sum(1).tolist() == [cells, cells]
    assert weights["centroids0"].norm(dim=2).max() < 1  # plain means of unit vectors
    moved = (
        weights[f"labeller.{name}"] - weights[name] for name in ("head.laterals.0.weight", "backbone.net.norm.weight")
    )
    assert all(part.abs().max() > 0 for part in moved)  # one step behind


@pytest.mark.train
def test_rounds_may_come_more_often_than_epochs(tmp_path):
    run = run_small("mdc", tmp_path, "x", *QUICK, "trainer.max_steps=4", "method.every=2")
    assert int(run.weights["round"]) == 1


NORMED = ["backbone=resnet18", "backbone.weights=none", "backbone.create={layers: [1,1,1,1], channels: [8,8,8,8]}"]
"""A network with batch norms."""


@pytest.mark.train
def test_a_run_killed_inside_an_epoch_goes_on_with_its_copy_and_its_statistics(tmp_path, monkeypatch):
    """Killed in step 5 of an epoch of five, after the checkpoint of step 3; with batch norms, whose running statistics
    the copy has of the epoch's beginning."""
    words = [*NORMED, *QUICK, "trainer.max_steps=6"]
    plain = run_small("picie", tmp_path, "plain", *words)
    end = RunKeeper.on_train_batch_end

    def dies(self, trainer, *rest):
        if trainer.global_step == 4:
            raise KeyError
        end(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "on_train_batch_end", dies)
        with pytest.raises(KeyError):
            run_small("picie", tmp_path, "killed", *words)
    saved = setup.read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 3
    assert int(saved["state_dict"]["round"]) == 0
    resumed = run_small("picie", tmp_path, "killed", *words)
    for name, value in plain.weights.items():
        assert torch.equal(resumed.weights[name], value), name


@pytest.mark.train
def test_final_clusters_are_kept_and_read_again(tmp_path):
    """With batch norms, whose statistics the last pass moves: they are in the checkpoint, so `eval` gives the same."""
    run = run_small("picie", tmp_path, "x", *NORMED, "trainer.max_steps=2", *QUICK)
    assert bool(run.weights["fresh_fitted"])
    metrics = evaluating.evaluate(run.folder / "checkpoints" / "last.ckpt", [])
    keys = [key for key in run.metrics if key.startswith("val/")]
    assert {"val/own/miou", "val/view1/miou", "val/view2/acc"} <= set(keys)
    for key in keys:
        assert metrics[key] == run.metrics[key], key
    held = run.weights["backbone.net.bn1.running_mean"] - run.weights["labeller.backbone.net.bn1.running_mean"]
    assert held.abs().max() > 0


@pytest.mark.parametrize("method", ["picie", "mdc"])
def test_padded_pictures_are_refused(method):
    with pytest.raises(ConfigError, match=r"data\.train_crop=keep"):
        model_of(method, "data.train_crop=keep")
