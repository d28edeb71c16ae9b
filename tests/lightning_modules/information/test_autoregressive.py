"""The autoregressive method: its options reach the training, orders are keyed, scores and probes are of order 0."""

import math

import pytest
import torch

import config
from common.errors import ConfigError
from engine import setup
from lightning_modules.information.autoregressive import Autoregressive
from losses.information import joint_of_box
from models.scratch.ordered import reading
from tests.conftest import run_small, small_words

TWO_STEPS = ["trainer.max_steps=2", "evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
OPTIONS = [
    ["method.orders=different"], ["method.over_clusters=20"], ["method.shift=10"], ["method.normalised=false"],
    ["backbone.create.attention_after=1"], ["backbone.create.stem_stride=1"], ["backbone.create.blocks=1"],
    ["backbone.freeze_norms=false"], ["backbone.levels=[0,1]"],
]  # fmt: skip


def build(*words: str) -> Autoregressive:
    cfg, data = setup.build_data(config.compose(small_words("autoregressive", *words)))
    return setup.build_model(cfg, data.meta).train()


def at(model: Autoregressive, step: int, monkeypatch) -> tuple[int, int]:
    monkeypatch.setattr(Autoregressive, "global_step", step)
    return model.orders()


def gradients(model: Autoregressive, images: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The loss of a step, and its gradient of all weights of network and decoder."""
    (group,) = model.param_groups()
    found = model.loss({"image": images}, None).total
    grads = torch.autograd.grad(found, group["params"])
    return float(found.detach()), torch.cat([grad.flatten() for grad in grads])


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run_small("autoregressive", tmp_path_factory.mktemp("plain"), "plain", *TWO_STEPS)


@pytest.mark.train
@pytest.mark.parametrize("words", OPTIONS, ids=",".join)
def test_every_option_changes_the_training(words, plain, tmp_path):
    other = run_small("autoregressive", tmp_path, "with", *TWO_STEPS, *words)
    name = "decoder.weight"
    assert torch.isfinite(other.weights[name]).all()
    assert other.weights[name].shape != plain.weights[name].shape or not torch.equal(
        other.weights[name], plain.weights[name]
    )


def test_rules_of_attention_change_the_loss(monkeypatch):
    monkeypatch.setattr(Autoregressive, "global_step", 1)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rules = ("masked", "multiplied", "reproduction")
    words = [["backbone.create.attention_after=1", f"backbone.create.attention={rule}"] for rule in rules]
    losses = [gradients(build(*own), images)[0] for own in words]
    assert len(set(losses)) == 3


def test_orders_are_those_of_the_step_and_may_be_equal_only_where_they_are_independent(monkeypatch):
    drawn = {kind: build(f"method.orders={kind}") for kind in ("independent", "different")}
    found = {kind: [at(model, step, monkeypatch) for step in range(80)] for kind, model in drawn.items()}
    for kind, pairs in found.items():
        assert {order for pair in pairs for order in pair} == set(range(1, 9))
        assert [at(drawn[kind], step, monkeypatch) for step in (70, 3)] == [pairs[70], pairs[3]]
    assert 3 <= sum(first == second for first, second in found["independent"]) <= 20
    assert all(first != second for first, second in found["different"])


def test_the_loss_of_counts_is_the_information_of_the_same_step(monkeypatch):
    """As reproduced, S (log S - I) / (B (2T+1)^2), where S is what the maps have in common at all shifts."""
    monkeypatch.setattr(Autoregressive, "global_step", 1)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    losses = [gradients(build(f"method.normalised={kind}"), images)[0] for kind in ("true", "false")]
    ones = torch.ones(2, 1, 32, 32)
    total = float(joint_of_box(ones, ones, 3))
    assert losses[1] == pytest.approx(total * (math.log(total) + losses[0]) / (2 * 7**2), rel=1e-5)


def test_codes_of_a_step_and_scores_are_of_order_0(monkeypatch):
    monkeypatch.setattr(Autoregressive, "global_step", 1)
    model, images = build(), torch.rand(2, 3, 32, 32)
    codes = model.loss({"image": images}, None).codes
    assert not codes.requires_grad
    features = model.backbone.features(images)
    assert torch.equal(codes, model.embed(features))
    assert model.classify(codes).shape == (2, 12, 8, 8)
    with reading(model.backbone.net, 5):
        assert not torch.allclose(model.embed(model.backbone.features(images)), codes)


def test_a_second_decoder_learns_beside_the_first(monkeypatch):
    monkeypatch.setattr(Autoregressive, "global_step", 1)
    images = torch.rand(2, 3, 32, 32)
    found = build("method.over_clusters=20").loss({"image": images}, None)
    assert set(found.parts) == {"information", "used", "over_information", "over_used"}
    assert float(found.total.detach()) == pytest.approx(
        -float(found.parts["information"]) * math.log(12) - float(found.parts["over_information"]) * math.log(20),
        rel=1e-4,
    )
    assert 1 <= float(found.parts["used"]) <= 12


def test_another_backbone_is_refused():
    cfg, data = setup.build_data(config.compose(["method=autoregressive", "backbone=tiny"]))
    with pytest.raises(ConfigError) as caught:
        setup.build_model(cfg, data.meta)
    assert str(caught.value) == (
        "backbone=tiny: method=autoregressive reads pictures in raster orders, which vit_tiny_patch16_224 cannot; set "
        "backbone=ordered"
    )
