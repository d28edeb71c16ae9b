"""Several resolutions in one command."""

import csv

import numpy as np
import pytest

import config
from common.errors import ConfigError
from engine import evaluating, training
from tests.conftest import read_json, run_small, small_words

pytestmark = pytest.mark.train


def test_all_scores_at_every_resolution(small_run, capsys):
    run = small_run("hidden_positives")
    last = run.folder / "checkpoints" / "last.ckpt"
    metrics = evaluating.evaluate(last, ["evaluation.resolutions=[48,64,[32,64]]", "evaluation.posthoc.epochs=2"])
    folder = run.folder / "eval" / "last@48+64+32x64"
    assert read_json(folder / "metrics.json") == metrics
    for key, value in run.metrics.items():
        if key.startswith("val/"):
            assert metrics[key.replace("val/", "val@48/")] == value, key  # 48 px are those of the run
    for size in ("48", "64", "32x64"):
        own = {key.partition("/")[2] for key in metrics if key.startswith(f"val@{size}/")}
        assert {"cluster/miou", "kmeans/acc", "linear/miou", "linear_posthoc/miou", "cluster/entropy"} <= own
        assert metrics[f"protocol@{size}/crop"] == "none"
        for name in ("classes.csv", "clusters.csv", "confusion.png", "panels/sheet.png"):
            assert (folder / size / name).is_file()
    assert [metrics[f"protocol@{size}/resolution"] for size in ("48", "64", "32x64")] == ["48", "64", "[32, 64]"]
    assert metrics["val@64/kmeans/acc"] != metrics["val@48/kmeans/acc"]
    assert not [key for key in metrics if key.startswith(("val/", "protocol/", "best/", "selection/"))]
    assert metrics["steps"] == 8
    alone = evaluating.evaluate(last, ["data.eval_size=64"])
    for key, value in alone.items():
        if key.startswith("val/"):
            assert metrics[key.replace("val/", "val@64/")] == value, key


def test_probes_are_fitted_once_at_the_size_of_the_run(tmp_path, monkeypatch):
    """A checkpoint from inside a run: its k-means probe is that of an evaluation at data.eval_size."""
    run = run_small("kmeans_baseline", tmp_path, "x", "trainer.max_steps=2")
    checkpoint = run.checkpoint
    for name in ("kmeans_probe.centroids", "kmeans_probe.fitted"):
        checkpoint["state_dict"][name].zero_()
    from engine.checkpoints import WholeCheckpointIO

    path = run.folder / "checkpoints" / "inside.ckpt"
    WholeCheckpointIO().save_checkpoint(checkpoint, path)
    metrics = evaluating.evaluate(path, ["evaluation.resolutions=[64,48]"])
    assert metrics["val@48/kmeans/miou"] == run.metrics["val/kmeans/miou"]


def test_kmeans_is_fitted_anew_to_reduced_codes(small_run, tmp_path):
    run = small_run("kmeans_baseline")
    last = run.folder / "checkpoints" / "last.ckpt"
    words = ["evaluation.kmeans.reduce=pca", "evaluation.kmeans.components=4", "evaluation.kmeans.clusters=9"]
    found = evaluating.evaluate(last, words)
    assert found["protocol/kmeans_reduce"] == "pca, 4 components"
    assert found["val/kmeans/miou"] != run.metrics["val/kmeans/miou"]
    assert found["val/cluster/miou"] == run.metrics["val/cluster/miou"]
    whole = run_small("kmeans_baseline", tmp_path, "x", *words[:2])
    assert whole.metrics["protocol/kmeans_reduce"] == "pca, 4 components"
    again = evaluating.evaluate(whole.folder / "checkpoints" / "last.ckpt", [])
    for key in ("val/kmeans/miou", "val/kmeans/confidence"):
        assert again[key] == whole.metrics[key]
    assert 0 < again["val/kmeans/confidence"] <= 100


def test_things_and_stuff_are_scored_apart(small_run):
    run = small_run("kmeans_baseline")
    last = run.folder / "checkpoints" / "last.ckpt"
    all_of_them = evaluating.evaluate(last, [])
    within = evaluating.evaluate(last, ["evaluation.partition=within"])
    none = evaluating.evaluate(last, ["evaluation.partition=none"])
    for group in ("things", "stuff"):
        for name in ("acc", "miou"):
            key = f"val/linear/{name}_{group}"
            assert run.metrics[key] == all_of_them[key]
            assert within[key] is None or within[key] >= all_of_them[key]  # no confusions with the other group
            assert key not in none
    assert within["val/linear/miou_stuff"] > all_of_them["val/linear/miou_stuff"]
    with (run.folder / "classes.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["linear"]]
    for group in ("things", "stuff"):
        mean = np.mean([float(row["linear"]) for row in rows if row["group"] == group])
        assert all_of_them[f"val/linear/miou_{group}"] == pytest.approx(mean, abs=1e-3)
    assert [found.get("protocol/partition") for found in (all_of_them, within, none)] == ["all", "within", None]


def refusal(action) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_sizes_that_cannot_be_evaluated_end_in_one_line(small_run, tmp_path):
    last = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    side = "whole numbers from 1 to 16384"
    rule = f"expected a list of {side} or lists of 2 {side}, no two alike"
    for value, shown in {
        "[48,0]": "[48, 0]", "[48,48]": "[48, 48]", "[a]": "[a]", "[48.5]": "[48.5]", "[[1,2,3]]": "[[1, 2, 3]]",
    }.items():  # fmt: skip
        line = refusal(lambda value=value: evaluating.evaluate(last, [f"evaluation.resolutions={value}"]))
        assert line == f"evaluation.resolutions={shown}: {rule}"
    assert refusal(lambda: evaluating.evaluate(last, ["evaluation.resolutions=[48,50]"])).startswith(
        "evaluation.resolutions: pictures of 50 x 50 px do not fit"
    )
    assert refusal(lambda: evaluating.evaluate(last, ["evaluation.resolutions=[48,16]"])).startswith(
        "data.eval_size=16: scenes cannot be drawn below 32 px"
    )
    words = small_words("kmeans_baseline", f"run.dir={tmp_path}", "evaluation.resolutions=[48,64]")
    assert refusal(lambda: training.train(config.compose(words))) == (
        "evaluation.resolutions=[48, 64]: training evaluates at data.eval_size alone; "
        "leave it out, and give it to `run.py eval ckpt=…` afterwards"
    )
