"""EAGLE: its options reach the training, who trains what, keys and levels, maps of any shape, ranks."""

import csv
import logging

import pytest
import torch

import config
from common.errors import ConfigError
from datamodules.base.views import make_views
from engine import setup
from lightning_modules.base.relations import Seen
from tests.conftest import Run, read_json, run_small, small_words
from tests.test_ddp import expect_equal, expect_equal_losses, run_two

THREE_STEPS = [
    "trainer.max_steps=3", "evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4",
    "method.objects.start=0",
]  # fmt: skip
OPTIONS = [
    ["dim=32"], ["blocks=2"], ["blocks=0"], ["terms.positive=0"], ["terms.negative=0"], ["shift.scale=1"],
    ["shift.bias=0.1"], ["shift.gradient=detached"], ["samples=5"], ["pointwise=false"], ["zero_clamp=false"],
    ["stabilize=false"], ["negatives.repeats=2"], ["negatives.draw=cycle"], ["cue.vectors=3"], ["cue.clusters=5"],
    ["cue.colour=released"], ["cue.sign=picture"], ["cue.scope=batch"], ["objects.start=1"], ["objects.share=0.5"],
    ["objects.weights.positive=0"], ["objects.weights.augmented=0"], ["objects.across=0.2"],
    ["objects.temperature=0.5"], ["objects.smoothing=0.1"], ["objects.prototypes=mean"], ["dropout.p=0"],
    ["dropout.signal=false"],
]  # fmt: skip


def model(*words: str, start: int = 0):
    """The method, one step after `start`, and a batch with its views."""
    cfg, data = setup.build_data(config.compose(small_words("eagle", f"method.objects.start={start}", *words)))
    made = setup.build_model(cfg, data.meta)
    batch = next(iter(data.train_dataloader()))
    return made, {"image": batch["image"], "augmented": batch["image"].flip(0).flip(0) * 0.98}


def stepped(made, views, step: int = 1):
    type(made).global_step = property(lambda _: step)
    try:
        return made.loss(views, made.features(views["image"]))
    finally:
        del type(made).global_step


def gradient(*words: str):
    """Of the head in a step in which all terms count."""
    made, views = model(*words)
    stepped(made, views).total.backward()
    return made.head.linear.weight.grad


@pytest.fixture(scope="module")
def plain():
    return gradient()


@pytest.mark.parametrize("words", OPTIONS, ids=",".join)
def test_every_option_changes_the_training(words, plain):
    other = gradient(*(f"method.{word}" for word in words))
    assert torch.isfinite(other).all()
    assert other.shape != plain.shape or not torch.equal(other, plain)


def test_the_second_view_is_blurred_and_nothing_else():
    made, _ = model("method.blur_p=1")
    image = torch.rand(4, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    found = make_views({"image": image}, made.views, seed=0, step=0)["augmented"]
    assert (found - image).abs().amax((1, 2, 3)).min() > 0
    torch.testing.assert_close(found.mean((2, 3)), image.mean((2, 3)), rtol=0, atol=0.01)
    assert (found.std((2, 3)) < image.std((2, 3))).all()
    made, _ = model("method.blur_p=0")
    assert torch.equal(make_views({"image": image}, made.views, seed=0, step=0)["augmented"], image)


def test_the_loss_is_made_of_its_parts():
    made, views = model("method.objects.share=0.6", "method.objects.weights.positive=0.5")
    found, terms = stepped(made, views), made.cfg.method.terms
    parts = found.parts
    wanted = 0.4 * sum(terms[kind] * parts[kind] for kind in ("positive", "negative"))
    wanted = wanted + 0.6 * (0.5 * parts["object_positive"] + 0.85 * parts["object_augmented"])
    wanted = wanted + (parts["cue_positive"] + parts["cue_augmented"]) / 2
    torch.testing.assert_close(found.total.detach(), wanted)


def test_the_cue_probes_alone_learn_from_the_cue():
    """Without the terms nothing else has a gradient; with all of them the cue probes have the same."""
    none = [f"method.terms.{kind}=0" for kind in ("positive", "negative")]
    gradients = []
    for words in (["method.objects.weights.positive=1e-30", "method.objects.weights.augmented=0", *none], []):
        made, views = model(*words)
        stepped(made, views).total.backward()
        gradients.append(
            {name: value.grad.clone() for name, value in made.named_parameters() if value.grad is not None}
        )
    alone, whole = gradients
    cues = [name for name in whole if name.startswith("cues.")]
    assert len(cues) == 2
    for name, gradient in alone.items():
        assert gradient.abs().max() < 1e-20 or name in cues, name
    for name in cues:
        assert alone[name].abs().sum() > 0
        assert torch.equal(alone[name], whole[name])


def test_before_the_start_the_projection_gets_zeros_and_not_none():
    """As in the release, whose optimiser counts these steps."""
    made, views = model(start=5)
    stepped(made, views).total.backward()
    for value in made.projection.parameters():
        assert torch.equal(value.grad, torch.zeros_like(value))
    made.zero_grad()
    stepped(made, views, step=6).total.backward()
    assert made.projection.linear.weight.grad.abs().sum() > 0


def test_signs_of_eigenvectors_and_of_centroids_turned_together_change_no_segment():
    made, _ = model()
    vectors, turn = torch.randn(2, 3, 5, 7), torch.tensor([1.0, -1, 1])
    probe = made.cues["positive"]
    before = probe.scores(vectors).argmax(1)
    with torch.no_grad():
        probe.clusters.mul_(turn)
    assert torch.equal(probe.scores(vectors * turn[:, None, None]).argmax(1), before)


def test_both_views_start_with_other_centroids():
    made, _ = model()
    assert not torch.equal(made.cues["positive"].clusters, made.cues["augmented"].clusters)


def test_explain_shows_the_segment_of_a_patch_and_leaves_padding_out():
    made, views = model()
    image = views["image"][0].clone()
    image[:, 32:] = 0
    features = made.eval().features(image[None])
    seen = Seen("x", image, (32, 48), features, made.embed(features))
    (found,) = made.relations([seen, seen], (0.4, 0.7))
    vectors = made.vectors(image[None, :, :32], {"positive": seen.codes[:, :, :4]})["positive"]
    labels = made.segments("positive", vectors)[0]
    assert torch.equal(found.maps[0][:4], labels == labels[2, 4])
    assert not found.maps[0][4:].any()
    assert f"{int(found.maps[0].sum())} of 24 patches" in found.rule
    assert not found.maps[1].any()  # ids mean something in their own picture alone
    everywhere, _ = model("method.cue.scope=batch")
    assert torch.equal(*everywhere.relations([seen, seen], (0.4, 0.7))[0].maps)


def test_features_are_the_keys_of_the_last_blocks_side_by_side():
    made, views = model("method.blocks=2")
    found = made.features(views["image"])
    wanted = made.backbone.features(views["image"], keys=[-2, -1]).keys
    assert torch.equal(found.concat(), torch.cat(wanted, dim=1))
    assert made.head.in_dim == 2 * 160
    assert made.features_key != model("method.blocks=3")[0].features_key


def test_k_means_can_be_asked_for_the_same_features():
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", "method.features=keys")))
    baseline, (made, views) = setup.build_model(cfg, data.meta), model()
    assert torch.equal(baseline.features(views["image"]).concat(), made.features(views["image"]).concat())
    assert baseline.code_dim == made.head.in_dim == 3 * 160


CNN = ["backbone=resnet18", "backbone.weights=none", "data.train_size=[64,96]", "data.eval_size=64"]


@pytest.mark.train
def test_a_network_without_keys_gives_its_levels_and_says_so_and_maps_need_no_square(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = run_small("eagle", tmp_path, "cnn", *CNN, *THREE_STEPS)
    assert "resnet18 has no attention keys: the features are its levels (backbone.levels)" in caplog.messages
    assert torch.isfinite(run.weights["head.linear.weight"]).all()


@pytest.mark.train
def test_kept_keys_are_those_of_the_backbone(tmp_path):
    words = [*THREE_STEPS, "data.flip_p=0", f"cache.dir={tmp_path}/cache"]
    curves = []
    for kept in ("false", "true"):
        run = run_small("eagle", tmp_path, kept, *words, f"backbone.cache_features={kept}")
        with (run.folder / "metrics.csv").open() as file:
            curves.append([float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]])
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)
    assert curves[0] != curves[1]  # half precision, so it was used


@pytest.mark.ddp
def test_two_processes_equal_one_with_segments_of_all_pictures(tmp_path):
    """Prototypes over the pictures of both processes, and weights that count by the mean of all."""
    words = ["method.cue.scope=batch", "method.objects.smoothing=0.1"]
    one = run_small("eagle", tmp_path, "one", *words)
    folder = run_two("eagle", tmp_path, *words)
    expect_equal(folder, Run(one.folder, read_json(one.folder / "metrics.json")))
    expect_equal_losses(folder, one)


REFUSED = {
    "method.blocks=7": "method.blocks=7: vit_tiny_patch16_224 has 6 blocks; choose at most so many",
    "method.shift.gradient=none": "method.shift.gradient=none: not one of released, detached",
    "method.cue.vectors=1": "method.cue.vectors=1: must be at least 2",
    "method.cue.scope=batches": "method.cue.scope=batches: not one of image, batch; did you mean batch?",
    "method.objects.share=2": "method.objects.share=2: expected a number from 0 to 1",
    "method.objects.prototypes=median": "method.objects.prototypes=median: not one of medoid, mean; did you mean mean?",
    "data.train_crop=keep": "data.train_crop=keep: padding would become patches of the loss; use random or center",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refusals(word, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("eagle", tmp_path, "x", word)
    assert str(caught.value) == REFUSED[word]
    assert not (tmp_path / "x").exists()


def test_nothing_to_learn_is_refused(tmp_path):
    words = ["method.terms.positive=0", "method.terms.negative=0", "method.objects.share=0"]
    with pytest.raises(ConfigError) as caught:
        run_small("eagle", tmp_path, "x", *words)
    assert str(caught.value) == "method.terms: every weight is 0, so nothing would be learned; set one above 0"
