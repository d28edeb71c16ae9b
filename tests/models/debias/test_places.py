"""`backbone.debias` of a real backbone: its maps, keys of caches, checkpoints, and what is refused."""

import logging

import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError
from engine import setup
from models.backbone import Backbone
from models.debias import removal
from tests.conftest import run_small
from tests.test_ddp import expect_equal, run_two


def made(*words):
    return Backbone(config.compose(["backbone=tiny", *words]).backbone)


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def test_blank_takes_a_black_pictures_directions_out_of_each_level(images):
    plain, debiased = made(), made("backbone.debias=blank", "backbone.debias_components=4")
    black = plain.features(torch.zeros(1, 3, 48, 64)).levels
    for level, found, dark in zip(plain.features(images).levels, debiased.features(images).levels, black, strict=True):
        basis = removal.blank_basis(dark[0], 4)
        torch.testing.assert_close(found, removal.without(level, basis))
        assert (basis.T @ found.flatten(2)).abs().max() < 1e-5
        assert F.cosine_similarity(found, level).min() < 0.999


def test_a_size_has_a_basis_of_its_own_which_is_computed_once(images, monkeypatch):
    debiased, seen = made("backbone.debias=blank"), []
    basis = removal.blank_basis
    monkeypatch.setattr(removal, "blank_basis", lambda maps, count: seen.append(maps.shape) or basis(maps, count))
    for picture in (images, images[:1], images.mT):
        debiased.features(picture)
    assert [tuple(shape[1:]) for shape in seen] == [(6, 8)] * 2 + [(8, 6)] * 2


def test_the_class_token_attention_and_plain_runs_are_left_alone(images):
    plain, debiased = (made(*words).features(images, attention=True) for words in ([], ["backbone.debias=blank"]))
    assert torch.equal(plain.attention, debiased.attention)
    assert torch.equal(plain.cls, debiased.cls)
    assert made().debias is None


def test_names_of_caches_and_checkpoints_tell_it_apart():
    words = ([], ["debias=blank"], ["debias=blank", "debias_components=4"], ["debias=rasa"])
    found = [made(*(f"backbone.{word}" for word in given)) for given in words]
    assert len({one.features_key for one in found}) == len({one.fingerprint for one in found}) == 4
    before = found[3].features_key
    found[3].debias.planes[0][0, 0, 0] = 1
    assert found[3].features_key != before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["debias=blank", "frozen=false"],
         "backbone.debias=blank: what is taken out belongs to a frozen network; set backbone.frozen=true, or "
         "backbone.debias=none"),
        (["debias_components=4"],
         "backbone.debias_components=4: nothing is taken out with backbone.debias=none; set blank or rasa, or "
         "backbone.debias_components=null"),
        (["debias=blank", "debias_components=160"],
         "backbone.debias_components=160: the smallest level has 160 channels, and nothing would be left; use far "
         "fewer (blank: 10 at most by itself)"),
        (["debias=rasa", "debias_components=3"],
         "backbone.debias_components=3: rasa takes out planes, two directions each; use an even number"),
    ],
)  # fmt: skip
def test_values_that_do_not_go_together_are_refused(words, said):
    with pytest.raises(ConfigError) as caught:
        made(*(f"backbone.{word}" for word in words))
    assert str(caught.value) == said


def test_keys_and_more_directions_than_patches_are_refused(images):
    with pytest.raises(ConfigError, match=r"backbone\.debias=blank: .* this method reads attention keys"):
        made("backbone.debias=blank").features(images, keys=[-1])
    with pytest.raises(ConfigError, match="pictures of this size have 48 patches"):
        made("backbone.debias=blank", "backbone.debias_components=48").features(images)


def test_half_precision_of_the_network_leaves_the_removal_exact(images):
    debiased = made("backbone.debias=rasa", "backbone.debias_components=4", "backbone.precision=bf16")
    for planes in debiased.debias.planes:
        planes.copy_(torch.randn(planes.shape, generator=torch.Generator().manual_seed(1)))
    for level, planes in zip(debiased.features(images).levels, debiased.debias.planes, strict=True):
        axes = removal.orthonormal(planes[-1])
        assert torch.einsum("bchw,kc->bkhw", level, axes).abs().max() < 1e-5


@pytest.mark.train
def test_planes_are_fitted_to_training_pictures_and_are_the_checkpoints(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words = ["backbone.debias=rasa", "backbone.debias_components=4", "trainer.max_steps=2", "evaluation.panels=0"]
    run = run_small("kmeans_baseline", tmp_path, "a", *words)
    assert "4 directions of each level are taken out" in caplog.text
    planes = {name: value for name, value in run.weights.items() if name.startswith("backbone.debias.planes")}
    assert [value.shape for value in planes.values()] == [(2, 2, 160)] * 2
    assert all(value.any() for value in planes.values())

    cfg, data = setup.build_data(config.restore(run.checkpoint["labelfree"]["config"]))
    model = setup.restore_model(run.checkpoint, cfg, data.meta)
    for name, value in planes.items():
        assert torch.equal(model.state_dict()[name], value)
    setup.connect(model, data)  # nothing is fitted anew
    batch = next(iter(data.train_dataloader()))
    levels = model.backbone.features(batch["image"]).levels
    for level, pairs in zip(levels, planes.values(), strict=True):
        axes = removal.orthonormal(pairs[1])  # the last one that was taken
        assert torch.einsum("bchw,kc->bkhw", level, axes).abs().max() < 1e-5


@pytest.mark.train
def test_every_score_of_a_method_is_of_the_features_without_places(tmp_path):
    one, two = (
        run_small("hidden_positives", tmp_path, kind, f"backbone.debias={kind}", "trainer.max_steps=2",
                  "evaluation.panels=0")
        for kind in ("none", "blank")
    )  # fmt: skip
    assert not torch.equal(one.weights["head.linear.weight"], two.weights["head.linear.weight"])


@pytest.mark.ddp
def test_two_processes_take_out_the_planes_of_one(tmp_path):
    one = run_small("smooseg", tmp_path / "one", "one", "backbone.debias=rasa")
    two = run_two("smooseg", tmp_path, "backbone.debias=rasa")
    assert bool(one.weights["backbone.debias.fitted"])
    expect_equal(two, one)
