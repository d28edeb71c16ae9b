"""PriMaPs-EM: its options reach the training, its parts follow each other, it begins with any trained method."""

import pytest
import torch
import torch.nn.functional as F

import config
from common.errors import CheckpointError, ConfigError
from engine import evaluating, setup, training
from lightning_modules.primaps import module
from lightning_modules.primaps.masks import PrincipalMasks, refined
from tests.conftest import Run, run_small, small_words

pytestmark = pytest.mark.train

SHORT = [
    "trainer.max_steps=6", "trainer.val_every=100", "method.start.steps=2", "method.ema.every=1",
    "evaluation.panels=0", "evaluation.kmeans.pictures=4", "data.train_count=12",
]  # fmt: skip
OPTIONS = [
    ["centred=false"], ["masks.centred=false"], ["masks.threshold=0.8"], ["masks.sign=library"], ["masks.crf=none"],
    ["start.steps=1"], ["start.pictures=4"], ["gamma=0"], ["ema.every=2"], ["ema.decay=0.3"], ["augment.blur_p=0"],
    ["augment.blur_sigma=[3,4]"], ["augment.blur_kernel=3"], ["augment.jitter_p=1"], ["augment.gray_p=1"],
    ["augment.either=false"],
]  # fmt: skip


def small(folder, name, *words) -> Run:
    return run_small("primaps", folder, name, f"cache.dir={folder / 'cache'}", *SHORT, *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("primaps")


@pytest.fixture(scope="module")
def plain(folder):
    return small(folder, "plain")


@pytest.mark.slow
@pytest.mark.parametrize("words", OPTIONS, ids=",".join)
def test_every_option_changes_the_training(words, plain, folder):
    other = small(folder, "other", "run.overwrite=true", *(f"method.{word}" for word in words))
    names = ("running.direction", "momentum.copy.direction")
    assert any(not torch.equal(other.weights[name], plain.weights[name]) for name in names)
    assert torch.isfinite(other.weights["running.direction"]).all()


def built(*words):
    cfg, data = setup.build_data(config.compose(small_words("primaps", *words)))
    return setup.build_model(cfg, data.meta), data


def test_the_first_prototypes_are_principal_directions_of_the_features(plain, folder, monkeypatch):
    """After no step of either part the slow ones are those, too."""
    seen = {}
    start = module.PrototypeHead.start
    monkeypatch.setattr(module.PrototypeHead, "start", lambda self, found: (seen.update(it=found), start(self, found)))
    run = small(folder, "first", "trainer.max_steps=1", "method.start.steps=0", "optim.prototypes.lr=1e-12")
    _, data = built("data.train_count=12")
    model, _ = built("data.train_count=12")
    rows = []
    for batch in data.loader("train", "train", purpose="x"):
        rows.append(model.embed(model.features(batch["image"])).transpose(0, 1).flatten(1).T.double())
    rows = torch.cat(rows)
    wanted = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[: len(seen["it"])]
    assert ((seen["it"].double() * wanted).sum(1).abs() > 0.99).all()
    torch.testing.assert_close(run.weights["momentum.copy.direction"], seen["it"])


def test_the_start_moves_directions_and_no_gain_and_the_slow_prototypes_are_copies(folder):
    run = small(folder, "start", "trainer.max_steps=2", "method.start.steps=2")
    assert (run.weights["running.gain"] == 1).all()
    for part in ("direction", "gain"):
        assert torch.equal(run.weights[f"running.{part}"], run.weights[f"momentum.copy.{part}"])
    assert int(run.weights["updates"]) == 0


def test_the_em_moves_gains_and_the_slow_prototypes_follow_every_so_many_steps(folder):
    """Four steps of the EM after two of the start: one update, behind the third."""
    run = small(folder, "em", "method.ema.every=2")
    assert int(run.weights["updates"]) == 1
    assert not torch.equal(run.weights["running.gain"], torch.ones_like(run.weights["running.gain"]))
    assert not torch.equal(run.weights["running.direction"], run.weights["momentum.copy.direction"])


def test_the_em_begins_with_a_new_optimiser(plain):
    state = plain.checkpoint["optimizer_states"][0]["children"][0]["state"]
    steps = sorted(int(value["step"]) for value in state.values())
    assert steps == [4, 4, 6, 6, 6]  # directions and gains; cluster probe, linear probe


def test_logits_of_patches_are_those_of_enlarged_features():
    """Heads are linear, so they come before the enlargement."""
    model, data = built()
    batch = next(iter(data.train_dataloader()))
    codes = model.embed(model.features(batch["image"]))
    model.running.start(torch.randn(*model.running.direction.shape, generator=torch.Generator().manual_seed(0)))
    ours = F.interpolate(model.running(codes), size=(48, 48), mode="bilinear", align_corners=False)
    theirs = model.running(F.interpolate(codes, size=(48, 48), mode="bilinear", align_corners=False))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# The stage.


def test_the_stage_keeps_ids_of_masks_at_the_size_of_what_it_saw():
    model, data = built()
    step = PrincipalMasks(model.backbone, model.cfg)
    batch = next(iter(data.loader("train", step.geometry(), purpose="x", batch_size=3)))
    batch["size"] = torch.full((3, 2), 48)
    records = step.records(batch)
    assert [record.fields["segments"].shape for record in records] == [(48, 48)] * 3
    for record in records:
        found = set(record.fields["segments"].ravel().tolist()) - {0}
        assert found == set(record.fields["names"].tolist())
        assert found
        assert sum(value.nbytes for value in record.fields.values()) < step.record_bytes()


def test_pictures_with_as_many_masks_are_refined_as_each_alone():
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    log_probs = [torch.randn(count, 4, 4, generator=torch.Generator().manual_seed(count)) for count in (3, 4, 3)]
    for crf in (PrincipalMasks(*stage()).crf, None):
        together = refined(crf, images, log_probs)
        for image, maps, labels in zip(images, log_probs, together, strict=True):
            assert torch.equal(refined(crf, image[None], [maps])[0], labels)


def stage():
    model, _ = built()
    return model.backbone, model.cfg


# On a trained method.

OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("hidden_positives", "smooseg", "kmeans_baseline")]


@pytest.fixture(scope="module", params=["stego", *OTHERS])
def trained(request, folder):
    words = ["trainer.max_steps=2", *SHORT[1:2], *SHORT[4:]]
    run = run_small(request.param, folder, request.param, *words)
    return request.param, run, run.folder / "checkpoints" / "last.ckpt"


def test_it_begins_with_the_codes_and_the_cluster_probe_of_a_trained_method(trained, folder, capsys):
    """With prototypes that do not move its own classes are those of that method's cluster probe, to the pixel; its
    checkpoint stands alone."""
    name, run, path = trained
    still = small(folder, f"on_{name}", f"method.init_from={path}", "optim.prototypes.lr=1e-12")
    assert still.metrics["stands_on"] == name
    assert still.metrics["val/own/miou"] == run.metrics["val/cluster/miou"]
    wanted = F.normalize(run.weights["cluster_probe.clusters"], dim=1)
    torch.testing.assert_close(still.weights["running.direction"], wanted)
    moved = path.rename(path.with_name("moved.ckpt"))
    try:
        again = evaluating.evaluate(still.folder / "checkpoints" / "last.ckpt", [])
    finally:
        moved.rename(path)
    assert again["val/own/miou"] == still.metrics["val/own/miou"]
    assert again["stands_on"] == name


def test_places_are_taken_out_as_the_trained_method_had_it(folder):
    words = ["backbone.debias=rasa", "backbone.debias_components=4", "trainer.max_steps=2", *SHORT[1:2], *SHORT[4:]]
    run = run_small("stego", folder, "placed", *words)
    path = run.folder / "checkpoints" / "last.ckpt"
    found = small(folder, "on_placed", f"method.init_from={path}", *words[:2], "seed=7")
    for name in ("backbone.debias.planes_0", "backbone.debias.planes_1"):
        assert torch.equal(found.weights[name], run.weights[name])


def test_a_trained_method_rests_while_prototypes_learn(folder, small_run):
    path = small_run("stego").folder / "checkpoints" / "last.ckpt"
    run = small(folder, "rests", f"method.init_from={path}", "method.ema.every=1")
    before = small_run("stego").weights
    for name in ("head.linear.weight", "head.nonlinear.0.weight"):
        assert torch.equal(run.weights[f"base.{name}"], before[name])
    assert not any(name.startswith(("base.backbone.", "base.cluster_probe.")) for name in run.weights)
    assert not torch.equal(run.weights["momentum.copy.gain"], torch.ones_like(run.weights["momentum.copy.gain"]))


def test_what_cannot_be_begun_with_ends_in_a_line(folder, small_run, tmp_path):
    path = small_run("stego").folder / "checkpoints" / "last.ckpt"

    def refusal(kind, *words):
        with pytest.raises(kind) as error:
            training.train(config.compose(small_words("primaps", f"run.dir={tmp_path}", *SHORT, *words)))
        return str(error.value)

    assert refusal(CheckpointError, f"method.init_from={tmp_path / 'no.ckpt'}").startswith(
        f"method.init_from={tmp_path / 'no.ckpt'}: no such file"
    )
    clusters = refusal(ConfigError, f"method.init_from={path}", "method.num_clusters=5")
    assert clusters.startswith("method.num_clusters=5: the clusters of method.init_from are 12")
    levels = refusal(CheckpointError, f"method.init_from={path}", "backbone.levels=[3]")
    assert "first difference backbone.levels" in levels
    changed = small_run("segsort").folder / "checkpoints" / "last.ckpt"
    assert "segsort trained its backbone" in refusal(CheckpointError, f"method.init_from={changed}")
    many = refusal(ConfigError, "method.num_clusters=500")
    assert many.startswith("method.num_clusters=500: features have")
