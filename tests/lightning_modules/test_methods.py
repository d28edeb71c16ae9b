"""What every registered method must keep: labels stay out, a resume changes nothing, files are complete."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import config
from common.errors import CheckpointError, ConfigError
from datamodules.scenes.module import ScenesDataModule
from engine import evaluating, setup, training
from engine.callbacks.run_keeper import RunKeeper
from lightning_modules import registry
from lightning_modules.base import segmenter
from tests.conftest import METHODS, Run, read_json, run_small, small_words

pytestmark = pytest.mark.train


class StopError(Exception):
    """Stands for a kill."""


def same_weights(one: Run, two: Run, outside: str = "") -> None:
    first, second = one.weights, two.weights
    assert first.keys() == second.keys()
    for name in first:
        if not outside or not name.startswith(outside):
            assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_run_folder_is_complete(method, small_run):
    run = small_run(method)
    for name in (
        "config.yaml", "metrics.json", "metrics.csv", "clusters.csv", "classes.csv", "confusion.png",
        "environment.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt", "panels/sheet.png",
    ):  # fmt: skip
        assert (run.folder / name).is_file(), name
    assert (run.folder.parent / "latest").resolve().is_dir()
    metrics = read_json(run.folder / "metrics.json")
    for key in ("val/cluster/miou", "val/kmeans/miou", "val/linear/acc", "best/cluster/miou"):
        assert 0 <= metrics[key] <= 100
    assert metrics["steps"] == 8
    cls = registry.method_class(method)  # what trains nothing, or has no score before its end, takes its last step
    chosen = cls.trains is not False and cls.headline not in ("kmeans", "instances")
    assert metrics["selection/uses_labels"] is chosen
    assert metrics["train_images_per_second"] > 0
    with (run.folder / "metrics.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert [int(row["step"]) for row in rows if row["train/cluster_probe"]] == list(range(1, 9))
    assert len([row for row in rows if row["val/cluster/miou"]]) == 2  # step 4, and the closing evaluation
    environment = read_json(run.folder / "environment.json")
    assert torch.__version__.startswith(environment["versions"]["torch"])
    panel = np.asarray(Image.open(run.folder / "panels" / "sheet.png"))
    assert panel.std() > 10


@pytest.mark.parametrize("method", METHODS)
def test_labels_never_reach_the_method(method, small_run, tmp_path, monkeypatch):
    """Train a second time with the labels shuffled: everything outside linear_probe. is bit-identical."""
    if registry.method_class(method).uses_labels:
        pytest.skip("declares that it trains with labels")
    plain = small_run(method)
    build = ScenesDataModule.build_source

    def shuffled(self, split):
        source = build(self, split)
        read = source.read

        def read_shuffled(index):
            image, label = read(index)
            rng = np.random.default_rng(index)
            return image, rng.permutation(label.ravel()).reshape(label.shape)

        source.read = read_shuffled
        return source

    monkeypatch.setattr(ScenesDataModule, "build_source", shuffled)
    other = run_small(method, tmp_path, "shuffled")
    same_weights(plain, other, outside="linear_probe.")
    changed = [name for name in plain.weights if name.startswith("linear_probe.")]
    assert any(not torch.equal(plain.weights[name], other.weights[name]) for name in changed)


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_goes_on_to_the_same_numbers(method, small_run, tmp_path, monkeypatch):
    """Killed at step 7, inside the second epoch; the checkpoint it goes on from is that of step 6."""
    plain = small_run(method)
    end = RunKeeper.on_train_batch_end

    def dies(self, trainer, *rest):
        if trainer.global_step == 7:
            raise StopError
        end(self, trainer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(RunKeeper, "on_train_batch_end", dies)
        with pytest.raises(StopError):
            run_small(method, tmp_path, "killed")
    assert not (tmp_path / "killed" / "metrics.json").exists()
    saved = setup.read_checkpoint(tmp_path / "killed" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 6
    resumed = run_small(method, tmp_path, "killed")
    same_weights(plain, resumed)
    for key, value in plain.metrics.items():
        if key != "train_images_per_second":
            assert resumed.metrics[key] == value, key
    one, two = ((run.folder / "metrics.csv").read_text() for run in (plain, resumed))
    assert one == two


@pytest.mark.parametrize("method", METHODS)
def test_eval_reproduces_the_run_to_the_digit(method, small_run):
    run = small_run(method)
    metrics = evaluating.evaluate(run.folder / "checkpoints" / "last.ckpt", [])
    for key, value in run.metrics.items():
        if key.startswith("val/"):
            assert metrics[key] == value, key
    assert (run.folder / "eval" / "last" / "metrics.json").is_file()


def test_eval_of_the_best_checkpoint_reproduces_its_scores(small_run):
    run = small_run("hidden_positives")
    metrics = evaluating.evaluate(run.folder / "checkpoints" / "best.ckpt", [])
    assert metrics["steps"] == run.metrics["best/step"]
    for key in ("cluster/miou", "cluster/acc", "linear/miou"):
        assert metrics[f"val/{key}"] == run.metrics[f"best/{key}"], key


def test_a_run_killed_in_its_closing_evaluation_keeps_its_history(small_run, tmp_path, monkeypatch):
    plain = small_run("kmeans_baseline")

    def dies(*_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(training, "close", dies)
        with pytest.raises(StopError):
            run_small("kmeans_baseline", tmp_path, "late")
    resumed = run_small("kmeans_baseline", tmp_path, "late")
    same_weights(plain, resumed)
    assert (resumed.folder / "metrics.csv").read_text() == (plain.folder / "metrics.csv").read_text()


def test_flip_averaging_changes_the_scores_and_is_named(small_run):
    run = small_run("hidden_positives")
    metrics = evaluating.evaluate(run.folder / "checkpoints" / "last.ckpt", ["evaluation.flip=true"])
    assert metrics["protocol/flip"] is True
    assert metrics["val/cluster/confidence"] != run.metrics["val/cluster/confidence"]


HP_OPTIONS = [
    ["method.positives.agnostic=false"],
    ["method.positives.specific=false"],
    ["method.positives.symmetric=false"],
    ["method.positives.agnostic=false", "method.positives.specific=false"],
    ["method.lhp.enabled=false"],
    ["method.lhp.attention=affinity"],
    ["method.pool.refill=release", "method.pool.half=true"],
    ["method.loss_version=2"],
    ["method.alpha=0"],
    ["method.augment.faithful=true"],
    ["method.dropout.p=0"],
    ["method.dropout.outputs=false"],
    ["method.reweighting=false"],
    ["method.rho=1"],
]


FIVE_STEPS = ["trainer.max_steps=5", "evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]


@pytest.fixture(scope="module")
def plain_five(tmp_path_factory) -> Run:
    """Hidden Positives with its defaults for five steps."""
    return run_small("hidden_positives", tmp_path_factory.mktemp("five"), "plain", *FIVE_STEPS)


@pytest.mark.parametrize(
    "words", HP_OPTIONS, ids=lambda words: ",".join(word.removeprefix("method.") for word in words)
)
def test_every_option_of_hidden_positives_changes_the_training(words, plain_five, tmp_path):
    """Each switch reaches the loss: five steps (a renewal and an epoch's end among them) end in other weights."""
    with_it = run_small("hidden_positives", tmp_path, "with", *FIVE_STEPS, *words)
    name = "head.linear.weight"
    assert torch.isfinite(with_it.weights[name]).all()
    assert not torch.equal(with_it.weights[name], plain_five.weights[name])


def test_a_finished_run_is_not_trained_again(small_run, monkeypatch):
    run = small_run("kmeans_baseline")
    monkeypatch.setattr(setup, "build_model", lambda *_: pytest.fail("built a model"))
    again = run_small("kmeans_baseline", run.folder.parent, run.folder.name)
    assert again.metrics == read_json(run.folder / "metrics.json")


def test_another_configuration_under_the_same_name_is_refused(small_run):
    run = small_run("kmeans_baseline")
    with pytest.raises(ConfigError) as caught:
        run_small("kmeans_baseline", run.folder.parent, run.folder.name, "optim.cluster_probe.lr=0.5")
    assert str(caught.value) == (
        f"run.name={run.folder.name}: {run.folder} holds a run with another configuration, first difference "
        "optim.cluster_probe.lr (0.005 -> 0.5); choose another name, or run.overwrite=true to empty it"
    )


def test_a_run_goes_on_from_a_named_checkpoint_for_more_steps(small_run, tmp_path):
    """From step 8 to 10: the k-means probe is fitted anew, and other settings or no further step are refused."""
    run = small_run("hidden_positives")
    last = f"run.resume={run.folder / 'checkpoints' / 'last.ckpt'}"
    longer = run_small("hidden_positives", tmp_path, "longer", last, "trainer.max_steps=10")
    assert longer.checkpoint["global_step"] == 10
    assert not torch.equal(longer.weights["kmeans_probe.centroids"], run.weights["kmeans_probe.centroids"])
    assert (longer.folder / "checkpoints" / "best.ckpt").is_file()
    with pytest.raises(CheckpointError, match=r"is at step 8 already; set trainer\.max_steps above it \(now 8\)"):
        run_small("hidden_positives", tmp_path, "same", last)
    with pytest.raises(CheckpointError, match=r"with other settings, first difference method\.dim \(16 -> 8\)"):
        run_small("hidden_positives", tmp_path, "other", last, "method.dim=8", "trainer.max_steps=10")
    assert not (tmp_path / "other").exists()


def test_loaders_of_a_method_hold_no_label(monkeypatch, tmp_path):
    seen = []

    def prepare(self, loader):
        batches = loader("train", limit=4)
        assert len(batches) == 1
        seen.extend(key for batch in batches for key in batch)

    monkeypatch.setattr(registry.method_class("kmeans_baseline"), "prepare", prepare)
    run_small("kmeans_baseline", tmp_path, "x", "trainer.max_steps=1", "evaluation.panels=0")
    assert "image" in seen
    assert not [key for key in seen if "label" in key]


def test_a_backbone_that_nothing_trains_must_be_frozen(tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small("hidden_positives", tmp_path, "x", "backbone.frozen=false", "trainer.max_steps=1")
    assert str(caught.value) == (
        "backbone.frozen=false: method=hidden_positives does not train the backbone; set backbone.frozen=true"
    )


def test_overwrite_empties_the_folder(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 99\n")
    run = run_small("kmeans_baseline", tmp_path, "x", "run.overwrite=true", "trainer.max_steps=1")
    assert run.metrics["steps"] == 1


def test_checkpoints_hold_no_frozen_backbone_and_load_without_code(small_run):
    run = small_run("hidden_positives")
    path = run.folder / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert not [name for name in checkpoint["state_dict"] if name.startswith("backbone.")]
    assert bool(checkpoint["state_dict"]["kmeans_probe.fitted"])
    facts = checkpoint["labelfree"]
    assert isinstance(facts["config"], dict)
    assert len(facts["clusters"]["cluster"]) == len(facts["classes"])


def test_a_cut_checkpoint_ends_in_one_line(small_run, tmp_path):
    run = small_run("kmeans_baseline")
    whole = (run.folder / "checkpoints" / "last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint") as caught:
        evaluating.evaluate(cut, [])
    assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="no such file"):
        evaluating.evaluate(tmp_path / "none.ckpt", [])


def test_another_backbone_is_refused(small_run, tmp_path):
    run = small_run("kmeans_baseline")
    checkpoint = run.checkpoint
    checkpoint["labelfree"]["backbone"] = "something else"
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"^backbone\.weights: the checkpoint was trained on something else"):
        evaluating.evaluate(tmp_path / "x.ckpt", [])


def test_the_same_seed_gives_the_same_weights_and_another_does_not(small_run, tmp_path):
    plain = small_run("hidden_positives")
    same_weights(plain, run_small("hidden_positives", tmp_path, "again"))
    other = run_small("hidden_positives", tmp_path, "other", "seed=1")
    assert not torch.equal(plain.weights["head.linear.weight"], other.weights["head.linear.weight"])


def test_every_method_file_has_a_yaml_and_one_class():
    for name in METHODS:
        cls = registry.method_class(name)
        assert issubclass(cls, segmenter.UnsupervisedSegmenter)
        assert cls.__doc__
        assert cls.embed is not segmenter.UnsupervisedSegmenter.embed
        if cls.trains:
            assert cls.loss is not segmenter.UnsupervisedSegmenter.loss


def test_views_given_to_a_method_hold_no_label():
    batch = {"image": 1, "label": 2, "augmented": 3, "augmented.label": 4, "id": ["a"]}
    views, label = segmenter.split_labels(batch)
    assert label == 2
    assert set(views) == {"image", "augmented", "id"}


def test_epochs_end_a_run_too(tmp_path):
    words = small_words(
        "kmeans_baseline", f"run.dir={tmp_path}", "run.name=e", "trainer.max_steps=null", "trainer.max_epochs=2"
    )
    assert training.train(config.compose(words))["steps"] == 10  # 22 pictures, batches of 4: 5 steps an epoch
