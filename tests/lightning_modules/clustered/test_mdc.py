"""MDC: its classifier, made anew with the clusters, and its samplings. Whole epochs of the release: tests/reference."""

import pytest
import torch
import torch.nn.functional as F

from engine.callbacks.run_keeper import RunKeeper
from lightning_modules.clustered.mdc import DEVIATION, new_weight
from tests.conftest import run_small
from tests.lightning_modules.clustered.test_rounds import QUICK, batch, model_of


def test_a_new_classifier_is_drawn_for_every_round():
    first, second = (new_weight((40, 64), 0, number) for number in (0, 1))
    assert float(first.std()) == pytest.approx(DEVIATION, rel=0.1)
    assert not torch.equal(first, second)
    assert torch.equal(first, new_weight((40, 64), 0, 0))


@pytest.mark.train
def test_the_classifier_and_its_optimiser_begin_anew_and_the_networks_goes_on(tmp_path, monkeypatch):
    """Epochs of five steps: after step 6 the classifier's Adam has counted one step, that of the network six."""
    seen = {}
    end = RunKeeper.on_train_batch_end

    def look(self, trainer, model, *rest):
        state = model.optimizers().optimizer.state
        if trainer.global_step == 6:
            seen["steps"] = [int(state[p]["step"]) for p in (model.weight, model.head.laterals[0].weight)]
            seen["moved"] = float((model.weight.detach() - new_weight(tuple(model.weight.shape), 0, 1)).abs().max())
        end(self, trainer, model, *rest)

    monkeypatch.setattr(RunKeeper, "on_train_batch_end", look)
    run_small("mdc", tmp_path, "x", *QUICK, "trainer.max_steps=6", "optim.classifier.lr=1e-3")
    assert seen["steps"] == [1, 6]
    assert 0 < seen["moved"] <= 1.01e-3  # one step of Adam


def test_the_loss_is_the_cross_entropy_of_the_classifier():
    model = model_of("mdc").train()
    model.centroids0.copy_(torch.randn(1, 6, model.code_dim))
    model.counts0.copy_(torch.tensor([[5, 1, 1, 1, 1, 1]]))
    with torch.no_grad():
        model.weight.normal_()
        model.bias.normal_()
    views = batch(model)
    logits = F.conv2d(model.codes_of(views, "view1"), model.weight[..., None, None], model.bias)
    expected = F.cross_entropy(logits, model.labels_of(views, 0)[0], model.counts0[0] / 10)
    found = model.loss(views, None).total
    assert torch.allclose(found, expected, atol=1e-5)
    found.backward()
    assert model.weight.grad.abs().sum() > 0


def test_the_centroids_may_be_the_classifier():
    model = model_of("mdc", "method.classifier=nonparametric")
    model.centroids0.copy_(torch.randn(1, 6, model.code_dim))
    codes = torch.rand(1, model.code_dim, 3, 3)
    logits = torch.einsum("bdhw,kd->bkhw", codes, model.centroids0[0])
    assert torch.allclose(model.classifier_logits(codes, 0), logits, atol=1e-5)
    assert not hasattr(model, "weight")
    assert [group["name"] for group in model.param_groups()] == ["backbone", "head"]


def test_cells_may_be_drawn_evenly_over_the_clusters(monkeypatch):
    model = model_of("mdc", "method.weights=uniform").train()
    monkeypatch.setattr(type(model), "global_step", 0)
    labels = torch.zeros(1, 6, 6, dtype=torch.int64)
    labels[0, 0, 0] = 3
    monkeypatch.setattr(model, "labels_of", lambda views, number: [labels])
    (((target,),), logits) = model.targets({}), torch.randn(1, 6, 6, 6)
    chosen, drawn = model._sampled(logits, target)
    assert chosen.shape == (1, 6, 1, 36)
    assert drawn.labels.flatten().bincount(minlength=6).tolist() == pytest.approx([18, 0, 0, 18, 0, 0], abs=1)
    rare = chosen[0, :, 0, drawn.labels.flatten() == 3]
    assert torch.equal(rare, logits[0, :, 0, :1].expand_as(rare))
