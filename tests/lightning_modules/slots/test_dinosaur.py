"""DINOSAUR: noise of a picture's own, groups that no batch changes, classes out of slots, and its settings."""

import csv

import pytest
import torch

import config
import run
from common.errors import ConfigError
from datamodules.scenes.drawing import META
from engine import setup
from lightning_modules.slots import dinosaur
from models.backbone import Backbone, Features
from models.slots.decoders import TransformerDecoder
from models.slots.slot_attention import SoftPosition, empty_slots
from tests.conftest import Run, run_small, small_words


def model(*words: str) -> dinosaur.Dinosaur:
    made = setup.build_model(config.compose(small_words("dinosaur", "method.num_clusters=12", *words)), META)
    return made.eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 48, 48), generator=torch.Generator().manual_seed(0)) / 255


def losses(run: Run, name: str = "train/loss") -> list[float]:
    with (run.folder / "metrics.csv").open() as handle:
        return [float(row[name]) for row in csv.DictReader(handle) if row[name]]


def test_noise_is_that_of_the_picture_in_any_batch_and_on_any_padding(images):
    found = dinosaur.picture_noise(0, images, 4, 8)
    assert torch.equal(dinosaur.picture_noise(0, images.flip(0), 4, 8), found.flip(0))
    padded = torch.nn.functional.pad(images[1:2], (0, 16, 0, 8))
    assert torch.equal(dinosaur.picture_noise(0, padded, 4, 8)[0], found[1])
    assert torch.equal(dinosaur.picture_noise(0, images[:1] + 1e-4, 4, 8)[0], found[0])
    others = torch.stack([found[0], found[1], dinosaur.picture_noise(1, images, 4, 8)[0]])
    assert len(others.flatten(1).unique(dim=0)) == 3
    assert dinosaur.picture_noise(0, torch.zeros(2, 3, 8, 8), 4, 8)[0].std() > 0.5


def test_noise_of_a_step_is_drawn_anew_for_every_picture_and_step():
    first, second = (dinosaur.step_noise(0, step, 2, 4, 8) for step in (5, 6))
    assert torch.equal(first, dinosaur.step_noise(0, 5, 2, 4, 8))
    assert len(torch.cat([first, second]).flatten(1).unique(dim=0)) == 4


def test_groups_of_a_picture_do_not_hang_on_its_batch(images):
    method = model()
    together = method.grouped(method.features(images))
    alone = method.grouped(method.features(images[1:2]))
    torch.testing.assert_close(alone.masks[0], together.masks[1], rtol=1e-4, atol=1e-5)
    codes = method.embed(method.features(images))
    assert codes.shape == (3, method.backbone.dim, 6, 6)
    torch.testing.assert_close(method.embed(method.features(images[1:2]))[0], codes[1], rtol=1e-4, atol=1e-4)


def test_codes_are_features_half_the_way_to_those_of_their_slots():
    tokens = torch.tensor([[[1.0], [3.0], [8.0]]])
    masks = torch.tensor([[[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]])
    found = dinosaur.Grouped(tokens, tokens, masks, tokens, masks, (1, 3))
    low, high = (1 + 1.5) / 1.5, (1.5 + 8) / 1.5
    assert dinosaur.codes_of(found)[0, 0, 0].tolist() == pytest.approx(
        [(1 + low) / 2, (3 + (low + high) / 2) / 2, (8 + high) / 2]
    )


def test_a_new_validation_looks_at_the_weights_as_they_are(images):
    method, batch = model(), {"image": images}
    before = method.grouped(method.features_of(batch))
    assert method.grouped(method.features_of(batch)) is before
    method.newest = None
    with torch.no_grad():
        method.start.mean += 1
    assert not torch.equal(method.grouped(method.features_of(batch)).slots, before.slots)


def test_the_strongest_slot_of_a_cluster_speaks_for_it_and_empty_slots_do_not():
    method = model()
    channels = method.backbone.dim
    with torch.no_grad():
        method.own.set(torch.eye(12, channels))
    tokens = torch.eye(3, channels)[None].mul(4)
    masks = torch.tensor([[[0.7, 0.2, 0.4], [0.2, 0.7, 0.2], [0.1, 0.1, 0.3], [0.0, 0.0, 0.1]]])
    assert empty_slots(masks).tolist() == [[False, False, True, True]]
    found = dinosaur.Grouped(tokens, tokens, masks, tokens, masks, (1, 3))
    assert method.clusters_of(found).tolist() == [[0, 1, -1, -1]]
    features = dinosaur.WithNoise([tokens.transpose(1, 2).unflatten(2, (1, 3))], grouped=found)
    scores = method.scores(features)[0, :, 0]
    torch.testing.assert_close(scores[:2], masks[0, :2])
    assert not scores[2:].any()
    shares = method.log_probs(method.embed(features), {"own": method.scores(features)}, (1, 3))["own"].exp()
    torch.testing.assert_close(shares.sum(1), torch.ones(1, 1, 3))
    assert shares[0, 0, 0, 0] == pytest.approx(0.7 / 0.9, abs=1e-4)


def test_features_of_nobodys_picture_share_one_draw(images):
    method = model()
    plain = Features(method.features(images).levels)
    assert torch.equal(method.embed(plain), method.embed(plain))


@pytest.mark.train
def test_an_exported_program_has_one_draw_for_all_pictures(small_run, tmp_path, images):
    last = small_run("dinosaur").folder / "checkpoints" / "last.ckpt"
    assert run.main(["export", f"ckpt={last}", f"output={tmp_path}/s.pt2"]) == 0
    program = torch.export.load(tmp_path / "s.pt2").module()
    assert program(images[:1]).shape == (1, 12, 6, 6)
    assert torch.equal(program(images[:1]), program(images[:1]))


@pytest.mark.train
def test_slots_are_scored_beside_groups_of_the_features_alone(small_run):
    metrics = small_run("dinosaur").metrics
    for name in ("slots", "feature_groups"):
        for key in ("mbo_i", "miou_i", "mbo_c"):
            assert 0 < metrics[f"val/{name}/{key}"] < 100
        assert -50 < metrics[f"val/{name}/fg_ari"] <= 100
    for key in ("own", "regions"):
        assert 0 < metrics[f"val/{key}/miou"] < 100
    assert metrics["headline"] == "own"
    assert abs(metrics["val/own/acc"] - metrics["val/regions/acc"]) < 5
    assert small_run("dinosaur").weights["own.fitted"]


CHANGES = [
    ["method.slots=3"],
    ["method.iterations=1"],
    ["method.position=soft"],
    ["method.decoder.kind=transformer", "method.decoder.transformer.layers=1"],
    ["method.decoder.mlp.shares=said"],
    ["method.decoder.mlp.init=torch"],
    ["optim.slots.decay_steps=2", "optim.slots.warmup=1"],
]


@pytest.mark.train
@pytest.mark.parametrize("words", CHANGES, ids=lambda words: words[0].removeprefix("method."))
def test_every_option_changes_the_training(words, small_run, tmp_path):
    small = run_small("dinosaur", tmp_path, "with", "trainer.max_steps=4", "evaluation.panels=0", *words)
    assert losses(small) != losses(small_run("dinosaur"))[:4]
    assert all(value < 1e3 for value in losses(small))


@pytest.mark.train
def test_options_of_the_evaluation_change_it(small_run, tmp_path):
    """Clusters of the scored pictures' own slots, and no groups of the features alone."""
    words = "method.own.split=val", "method.own.pictures=null", "method.compare=false"
    other, plain = run_small("dinosaur", tmp_path, "with", *words), small_run("dinosaur")
    assert losses(other) == losses(plain)
    assert not torch.equal(other.weights["own.centroids"], plain.weights["own.centroids"])
    assert not [key for key in other.metrics if "feature_groups" in key]


def test_groups_are_what_slots_took_or_what_the_decoder_says(images):
    said = "method.decoder.mlp.shares=said"
    for words, attended in (((), True), ((said,), False), ((said, "method.masks=attention"), True)):
        method = model(*words)
        found = method.grouped(method.features(images))
        assert torch.equal(found.masks, found.attention) == attended


@pytest.mark.train
def test_features_are_kept_unless_said_otherwise_and_the_backbone_rests(small_run, tmp_path, monkeypatch):
    assert config.compose(["method=dinosaur"]).backbone.cache_features
    words = "backbone.cache_features=true", f"cache.dir={tmp_path}/cache", "evaluation.panels=0"
    kept = run_small("dinosaur", tmp_path, "kept", *words)
    plain = losses(small_run("dinosaur"))
    assert losses(kept) == pytest.approx(plain, rel=5e-3)
    assert losses(kept) != plain
    passes, real = [], Backbone.features
    monkeypatch.setattr(
        Backbone, "features", lambda self, images, *a, **k: passes.append(len(images)) or real(self, images, *a, **k)
    )
    assert losses(run_small("dinosaur", tmp_path, "again", *words)) == losses(kept)
    assert sum(passes) <= 2 + 2 * 2 * 22  # shapes; k-means and slots of 22 pictures, for the last and the best step


def test_a_network_without_positions_gets_them():
    assert isinstance(model().position, torch.nn.Identity)
    found = model("backbone=resnet18", "backbone.weights=none", "backbone.output_stride=8")
    assert isinstance(found.position, SoftPosition)
    assert isinstance(model("method.decoder.kind=transformer").decoder, TransformerDecoder)


def test_the_decoders_places_are_those_of_the_training_pictures():
    assert model("data.train_size=[48,64]").decoder.grid == (6, 8)
    assert dinosaur.cells(50, 16) == (4, 4)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["method.decoder.kind=transformer", "method.decoder.transformer.heads=7"],
         "method.decoder.transformer.heads=7: must divide the 160 channels of the features of tiny; set another number "
         "of heads"),
        (["method.own.split=val"],
         "method.own.pictures=1000: with method.own.split=val all pictures are clustered, as released; set "
         "method.own.pictures=null"),
        (["method.slots=37"], "method.slots=37: a picture of data.eval_size=48 has 36 patches; lower method.slots"),
        (["method.masks=attention"],
         "method.masks=attention: with method.decoder.mlp.shares=attention the decoder's masks are that map already; "
         "set method.masks=decoder, or method.decoder.mlp.shares=said"),
        (["data.eval_crop=keep"],
         "data.eval_crop=keep: padding would become patches that slots explain; set data.eval_crop=center or none"),
        (["data.train_crop=keep"],
         "data.train_crop=keep: padding would become patches of the loss; use random or center"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(words, text):
    with pytest.raises(ConfigError) as caught:
        model(*words)
    assert str(caught.value) == text
