"""The post-hoc linear probe: frozen network, its own epochs, labels of the training split alone."""

import numpy as np
import pytest
import torch
from PIL import Image

import config
from common.errors import ConfigError
from common.spec import IGNORE
from datamodules.scenes.module import SceneSource
from engine import evaluating, fitting, setup, training
from engine.fitting import Kept, PosthocFit
from tests.conftest import Run, read_json, run_small, small_words

EPOCHS = "evaluation.posthoc.epochs=3"
WEIGHT = "posthoc_probe.classifier.weight"


@pytest.fixture(scope="module")
def with_probe(tmp_path_factory) -> Run:
    """The small run of Hidden Positives with a post-hoc linear probe."""
    return run_small("hidden_positives", tmp_path_factory.mktemp("posthoc"), "p", EPOCHS)


@pytest.mark.train
def test_the_probe_is_scored_kept_and_reproduced(with_probe, small_run):
    plain = small_run("hidden_positives")
    for key, value in plain.metrics.items():
        if key.startswith("val/"):
            assert with_probe.metrics[key] == value, key  # nothing else changes
    assert 0 < with_probe.metrics["val/linear_posthoc/miou"] <= with_probe.metrics["val/linear_posthoc/acc"] <= 100
    assert WEIGHT in with_probe.weights
    assert WEIGHT not in plain.weights
    with (with_probe.folder / "classes.csv").open() as handle:
        assert handle.readline().strip().endswith("linear,linear_posthoc")
    again = evaluating.evaluate(with_probe.folder / "checkpoints" / "last.ckpt", [])
    for key, value in with_probe.metrics.items():
        if key.startswith("val/"):
            assert again[key] == value, key


@pytest.mark.train
def test_eval_fits_the_probe_where_the_run_did_not(with_probe, small_run, monkeypatch):
    """From a checkpoint of the same run without it: the same network, so the same probe and the same score."""
    last = small_run("hidden_positives").folder / "checkpoints" / "last.ckpt"
    fitted = []
    fit = PosthocFit.fit
    monkeypatch.setattr(PosthocFit, "fit", lambda *args: fitted.append(fit(*args)) or fitted[-1])
    metrics = evaluating.evaluate(last, [EPOCHS])
    for name in ("acc", "miou"):
        key = f"val/linear_posthoc/{name}"
        assert metrics[key] == with_probe.metrics[key]
    assert torch.equal(fitted[0].classifier.weight, with_probe.weights[WEIGHT])
    panel = np.asarray(Image.open(last.parents[1] / "eval" / "last" / "panels" / "sheet.png"))
    other = np.asarray(Image.open(last.parents[1] / "panels" / "sheet.png"))
    assert panel.shape[1] > other.shape[1]  # one column more
    mine = with_probe.folder / "checkpoints" / "last.ckpt"
    evaluating.evaluate(mine, ["evaluation.posthoc.lr=0.01"])
    assert len(fitted) == 2  # another setting: fitted anew
    assert not torch.equal(fitted[1].classifier.weight, fitted[0].classifier.weight)
    off = evaluating.evaluate(mine, ["evaluation.posthoc.epochs=0"])
    assert "val/linear_posthoc/miou" not in off
    assert len(fitted) == 2


@pytest.mark.train
def test_codes_that_are_not_kept_are_computed_anew_to_the_same_values(with_probe, small_run):
    last = small_run("hidden_positives").folder / "checkpoints" / "last.ckpt"
    metrics = evaluating.evaluate(last, [EPOCHS, "evaluation.posthoc.keep_mb=0"])
    assert metrics["val/linear_posthoc/miou"] == with_probe.metrics["val/linear_posthoc/miou"]


@pytest.mark.train
def test_a_prolonged_run_fits_its_probe_anew(with_probe, tmp_path):
    last = with_probe.folder / "checkpoints" / "last.ckpt"
    words = [f"run.resume={last}", "trainer.max_steps=10", EPOCHS]
    longer = run_small("hidden_positives", tmp_path, "longer", *words)
    assert not torch.equal(longer.weights[WEIGHT], with_probe.weights[WEIGHT])


@pytest.mark.train
def test_the_probe_learns_what_the_online_probe_had_no_time_for(small_run):
    """Colours at 48 px, eight online steps against thirty epochs."""
    run = small_run("kmeans_baseline")
    metrics = evaluating.evaluate(
        run.folder / "checkpoints" / "last.ckpt", ["evaluation.posthoc.epochs=30", "evaluation.posthoc.lr=0.005"]
    )
    assert metrics["val/linear_posthoc/acc"] > metrics["val/linear/acc"] + 5


def folder(root, labelled: int, pictures: int = 8):
    """Left and right halves of two brightnesses; the first `labelled` training pictures have labels, and all of val."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for i in range(pictures):
            half = np.tile(np.arange(48) // 24, (48, 1)).astype(np.uint8)
            picture = rng.integers(0, 90, (48, 48, 3), dtype=np.uint8) + 120 * half[..., None]
            Image.fromarray(picture).save(root / "images" / split / f"{i}.png")
            if split == "val" or i < labelled:
                Image.fromarray(half).save(root / "labels" / split / f"{i}.png")
    (root / "classes.json").write_text('["left", "right"]')
    small = [word for word in small_words("kmeans_baseline") if not word.startswith("data")]
    sizes = ["data=folder", f"data.root={root}", "data.train_size=48", "data.eval_size=48", "data.batch_size=4"]
    return [*small, *sizes, f"run.dir={root}/runs", "run.name=x", "trainer.max_steps=1"]


@pytest.mark.train
def test_half_labelled_pictures_do(tmp_path, monkeypatch):
    words = folder(tmp_path, labelled=5)
    read = []
    original = fitting.Chosen.id
    monkeypatch.setattr(fitting.Chosen, "id", lambda self, i: read.append(original(self, i)) or read[-1])
    more = ["method.features=colour", "evaluation.posthoc.epochs=40", "evaluation.posthoc.lr=0.05"]
    metrics = fitting_run(words, *more)
    assert set(read) < {str(i) for i in range(5)}  # four of the five labelled ones fill a batch
    assert len(read) == 4  # computed once, kept
    assert metrics["val/linear_posthoc/miou"] > 90
    assert metrics == read_json(tmp_path / "runs" / "x" / "metrics.json")


def fitting_run(words, *more):
    return training.train(config.compose([*words, *more]))


UNLABELLED = (
    "evaluation.posthoc.epochs=2: the probe learns from labels and no training picture has one; "
    "set evaluation.posthoc.epochs=0, or add labels of training pictures"
)


@pytest.mark.train
def test_without_a_labelled_training_picture_it_ends_in_one_line(tmp_path, monkeypatch, small_run):
    with pytest.raises(ConfigError) as caught:
        fitting_run(folder(tmp_path, labelled=0), "evaluation.posthoc.epochs=2")
    assert str(caught.value) == UNLABELLED
    assert not (tmp_path / "runs").exists()  # known before anything is made
    last = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    read = SceneSource.read

    def void(self, index):
        image, label = read(self, index)
        return image, np.full_like(label, IGNORE) if self.split == "train" else label

    monkeypatch.setattr(SceneSource, "read", void)  # known only once the labels are read
    with pytest.raises(ConfigError) as caught:
        evaluating.evaluate(last, ["evaluation.posthoc.epochs=2"])
    assert str(caught.value) == UNLABELLED


def test_settings_are_checked():
    for word, text in {
        "evaluation.posthoc.epochs=-1": "evaluation.posthoc.epochs=-1: must not be negative",
        "evaluation.posthoc.lr=-1": "evaluation.posthoc.lr=-1: must not be negative",
        "evaluation.posthoc.optimizer=lion": ("evaluation.posthoc.optimizer=lion: not one of adam, adamw, sgd"),
    }.items():
        with pytest.raises(ConfigError) as caught:
            config.compose([word])
        assert str(caught.value) == text


def test_more_clusters_than_codes_are_noticed_at_the_start(tmp_path):
    """22 pictures of 6x6 patches give 792 codes; the run folder is not made."""
    words = small_words("kmeans_baseline", f"run.dir={tmp_path}/runs")
    with pytest.raises(ConfigError) as caught:
        training.train(config.compose([*words, "method.num_clusters=793"]))
    assert str(caught.value) == (
        "method.num_clusters=793: the k-means probe needs a point a cluster, and 22 training pictures with 36 codes "
        "each give 792; lower method.num_clusters, give more pictures, or raise evaluation.kmeans.pictures and "
        "evaluation.kmeans.points"
    )
    few = ["evaluation.kmeans.pictures=2", "evaluation.kmeans.points=13", "method.num_clusters=13"]
    with pytest.raises(ConfigError, match=r"2 training pictures with 6 codes each give 12;"):
        training.train(config.compose([*words, *few]))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("world", "pictures", "batch"), [(1, 10, 4), (2, 10, 4), (2, 3, 8), (4, 1, 8), (2, 8, 4)])
def test_ranks_share_the_batches_of_one_process(world, pictures, batch, monkeypatch):
    cfg = config.compose([f"data.train_count={pictures}", f"data.batch_size={batch}"])
    data = setup.build_data(cfg)[1]
    monkeypatch.setattr(fitting.distributed, "world_size", lambda: 1)
    one, size, steps = PosthocFit(cfg, data).arranged()
    monkeypatch.setattr(fitting.distributed, "world_size", lambda: world)
    shared, shared_size, shared_steps = PosthocFit(cfg, data).arranged()
    assert shared_steps == steps == max(1, pictures // batch)
    assert shared_size % world == 0
    if size % world == 0:
        parts = np.array(shared.indices).reshape(world, steps, -1)  # what `loader` gives to every rank
        for step in range(steps):
            assert parts[:, step].ravel().tolist() == one.indices[step * size : (step + 1) * size]
    else:
        assert set(shared.indices) == set(one.indices)


def test_batches_are_kept_whole_or_not_at_all():
    codes, label = torch.randn(2, 64, 8, 8), torch.zeros(2, 512, 512, dtype=torch.int64)
    kept = Kept(2)
    for _ in range(2):
        kept.add(codes, label)
        assert len(kept.batches) == (1 if kept.room >= 0 else 0)
    kept.close()
    assert not kept.complete
    kept = Kept(2)
    kept.add(codes, label)
    kept.close()
    assert kept.complete
    assert torch.equal(kept.batches[0][0], codes)
