"""The FCN probe against the plain formulas, in blocks, on two processes, and in a run."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import config
from common.errors import ConfigError
from common.spec import ClassMeta
from engine import evaluating, setup
from engine.fitting import FCNFit
from evaluation import readout
from evaluation.fcn_probe import FCNProbe, configured
from tests.conftest import run_small, small_words
from tests.support.ranks import on_two_ranks

WORDS = ["trainer.max_steps=2", "evaluation.fcn.epochs=3", "evaluation.fcn.channels=8", "evaluation.fcn.size=12"]


def drawn(seed=0):
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (4, 9, 9), generator=generator)
    label[label == 3] = 255
    return torch.randn(4, 5, 3, 3, generator=generator), label


def probe(size=6, dropout=0.25):
    return FCNProbe(5, 3, channels=7, size=size, dropout=dropout, seed=2)


def test_layers_are_those_of_the_head():
    own, (codes, _) = probe(), drawn()
    maps = F.interpolate(codes, size=(6, 6), mode="bilinear", align_corners=False)
    one = F.conv2d(maps, own.first.weight, own.first.bias, padding=1).relu()
    two = F.conv2d(one, own.second.weight, own.second.bias, padding=1).relu()
    three = F.conv2d(torch.cat([maps, two], 1), own.both.weight, own.both.bias, padding=1).relu()
    wanted = F.conv2d(three, own.classifier.weight, own.classifier.bias)
    assert torch.allclose(own(codes), wanted, atol=1e-6)
    assert probe(size=None)(codes).shape == (4, 3, 3, 3)


@pytest.mark.parametrize("block", [1, 1 << 24])
def test_gradients_are_those_of_the_mean_over_labelled_places(monkeypatch, block):
    monkeypatch.setattr(readout, "BLOCK", block)
    own, (codes, label) = probe(), drawn()
    kept = own.drawn(3, 4, 4)
    loss, found = own.gradients(codes, label, kept)
    target = F.interpolate(label[:, None].float(), size=(6, 6), mode="nearest")[:, 0].long()
    wanted = F.cross_entropy(own(codes, kept), target, ignore_index=255)
    assert torch.allclose(loss, wanted, atol=1e-6)
    for one, two in zip(found, torch.autograd.grad(wanted, list(own.parameters())), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_dropout_leaves_out_channels_by_step():
    own = probe(dropout=0.5)
    assert set(own.drawn(0, 40, 40).unique().tolist()) == {0.0, 2.0}
    assert torch.equal(own.drawn(1, 4, 4), own.drawn(1, 4, 4))
    assert not torch.equal(own.drawn(1, 4, 4), own.drawn(2, 4, 4))
    assert probe(dropout=0).drawn(0, 4, 4) is None


def test_predictions_do_not_depend_on_blocks(monkeypatch):
    own, (codes, _) = probe(), drawn()
    whole = own.predict(codes, (9, 9))
    assert torch.equal(whole, readout.upsample(own(codes), (9, 9)).argmax(1))
    monkeypatch.setattr(readout, "BLOCK", 1)
    assert torch.equal(own.predict(codes, (9, 9)), whole)


def half(rank):
    own, (codes, label) = probe(), drawn()
    rows = slice(2 * rank, 2 * rank + 2)
    _, found = own.gradients(codes[rows], label[rows], own.drawn(1, 4, 2))
    for gradient in found:
        dist.all_reduce(gradient)
        gradient /= 2
    return found


@pytest.mark.ddp
def test_two_processes_have_the_gradients_of_one():
    own, (codes, label) = probe(), drawn()
    _, wanted = own.gradients(codes, label, own.drawn(1, 4, 4))
    for found in on_two_ranks(half):
        for one, two in zip(found, wanted, strict=True):
            assert torch.allclose(one, two, atol=1e-6)


@pytest.mark.train
def test_a_run_scores_and_keeps_it_and_eval_reproduces_it(tmp_path):
    run = run_small("kmeans_baseline", tmp_path, "x", *WORDS)
    assert 0 < run.metrics["val/fcn/miou"] <= run.metrics["val/fcn/acc"] <= 100
    assert run.metrics["protocol/fcn"].startswith(
        "labels of training pictures, 8 channels on 12 x 12, dropout 0.1, 3 ep"
    )
    assert run.weights["further.fcn.probe.first.weight"].shape[0] == 8
    with (run.folder / "classes.csv").open() as handle:
        assert handle.readline().strip().endswith("linear,fcn")
    last = run.folder / "checkpoints" / "last.ckpt"
    fitted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FCNFit, "fit", lambda *args: fitted.append(args))
        again = evaluating.evaluate(last, [])
        assert "val/fcn/miou" not in evaluating.evaluate(last, ["evaluation.fcn.epochs=0"])
    assert not fitted
    for key in ("val/fcn/acc", "val/fcn/miou"):
        assert again[key] == run.metrics[key]
    other = evaluating.evaluate(last, ["evaluation.fcn.channels=4"])
    assert other["protocol/fcn"].startswith("labels of training pictures, 4 channels")
    anew = evaluating.evaluate(last, ["evaluation.fcn.epochs=3"])
    assert anew["val/fcn/miou"] == run.metrics["val/fcn/miou"]


def test_data_without_labels_has_none():
    cfg = config.compose(["method=kmeans_baseline", "evaluation.fcn.epochs=1"])
    assert configured(cfg, ClassMeta()) == []
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", "evaluation.fcn.epochs=1")))
    data.meta = ClassMeta()
    with pytest.raises(ConfigError) as caught:
        FCNFit(cfg, data).check()
    assert str(caught.value) == (
        "evaluation.fcn.epochs=1: the probe learns from labels and no training picture has one; set "
        "evaluation.fcn.epochs=0, or add labels of training pictures"
    )
