"""The score that a run is known by, and where it leads."""

import json
import logging

import pytest
import yaml

from engine import evaluating
from engine.records.metrics_file import read_metrics
from evaluation import headline
from launch import space, sweep, trials
from lightning_modules import registry
from lightning_modules.base import UnsupervisedSegmenter
from reporting import report
from tests.conftest import read_json, run_small

BASELINE = {
    "method": "kmeans_baseline", "headline": "kmeans", "num_clusters": 12, "val/cluster/acc": 30.0,
    "val/cluster/miou": 11.7, "val/kmeans/acc": 50.0, "val/kmeans/miou": 30.6, "val/linear/acc": 70.0,
    "val/linear/miou": 40.0,
}  # fmt: skip


def test_methods_name_their_headline():
    found = {name: registry.method_class(name).headline for name in registry.names()}
    other = {"kmeans_baseline": "kmeans", "tokencut": "foreground"}
    other["cutler"] = "instances"
    other |= dict.fromkeys(("context_prediction", "cooccurrence"), "kmeans")
    own = ("cause", "deep_spectral", "normalized_cut", "primaps", "smooseg", "transfgu")
    own += (
        "acseg",
        "autoregressive",
        "comus",
        "iic",
        "maskcontrast",
        "maskdistill",
        "mdc",
        "picie",
        "slotcon",
        "dinosaur",
    )
    assert found == {name: other.get(name, "own" if name in own else "cluster") for name in found}
    assert all(registry.method_class(name).title for name in registry.names())


def test_a_method_with_classes_of_its_own_leads_with_them_unless_it_says_otherwise():
    class Own(UnsupervisedSegmenter):
        def scores(self, features):
            return features.map

    class Further(Own):
        headline = "kmeans"

    assert (UnsupervisedSegmenter.headline, Own.headline, Further.headline) == ("cluster", "own", "kmeans")


def test_keys_of_the_headline():
    assert headline.key_of(BASELINE) == "val/kmeans/miou"
    assert headline.key_of({"headline": "cluster", "val/cluster/entropy": 9.0}) == "val/cluster/entropy"
    assert headline.key_of({"headline": "foreground", "val/foreground/iou": 9.0}) == "val/foreground/iou"
    assert headline.key_of({"headline": "own", "val/cluster/entropy": 9.0}) is None
    assert headline.key_of({"val/own/miou": 1.0, "val/cluster/miou": 2.0}) == "val/own/miou"  # an old run
    assert headline.key_of({"val/cluster/miou": 2.0}) == "val/cluster/miou"
    assert headline.expected("foreground") == "val/foreground/iou"
    assert headline.key_of({"headline": "instances", "val/instances/mask_AP": 9.0}) == "val/instances/mask_AP"
    assert headline.expected("instances") == "val/instances/mask_AP"


def test_the_closing_table_leads_with_it():
    table = report.final_table(BASELINE)
    assert list(table.columns[0].cells) == ["kmeans", "cluster", "linear"]
    assert [row.style for row in table.rows] == ["bold", None, None]
    assert headline.sentence(BASELINE) == "score: kmeans, 30.6 mIoU; 12 clusters"
    assert headline.sentence({"headline": "own", "num_clusters": 5}) == "score: own; 5 clusters"


def test_an_old_run_has_the_headline_of_its_method(tmp_path):
    path = tmp_path / "metrics.json"
    old = {key: value for key, value in BASELINE.items() if key not in ("headline", "num_clusters")}
    path.write_text(json.dumps(old))
    assert headline.key_of(read_metrics(path)) == "val/kmeans/miou"
    path.write_text(json.dumps(old | {"method": "gone"}))
    assert headline.key_of(read_metrics(path)) == "val/cluster/miou"


def test_a_trial_reports_it(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(BASELINE))
    (tmp_path / "environment.json").write_text('{"seconds": 12.0}')
    for target, shown in ((None, "val/kmeans/miou 30.60"), ("val/linear/miou", "val/linear/miou 40.00")):
        queue = trials.Queue("comparison", tmp_path, [trials.Trial(0, {}, [], tmp_path)], target)
        queue.trials[0].look(queue.target)
        queue.report(queue.trials[0])
        assert shown in capsys.readouterr().out


def test_a_sweep_without_a_metric_follows_it(tmp_path):
    tree = {
        "program": "run.py",
        "command": ["${program}", "train", "method=kmeans_baseline", "${args_no_hyphens}"],
        "method": "grid",
        "parameters": {"seed": {"values": [0, 1]}},
    }
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(tree))
    found = space.read(path)
    assert sweep.headline_of(found, []) == "val/kmeans/miou"
    assert sweep.headline_of(found, ["method=transfgu"]) == "val/own/miou"
    following = found.following("val/own/miou")
    assert (following.target, following.maximized) == ("val/own/miou", True)


@pytest.mark.train
def test_a_run_says_its_headline_its_clusters_and_the_loss_of_its_file(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    words = ("trainer.progress=lines", "trainer.log_every=1", "trainer.val_every=4")
    run = run_small("hidden_positives", tmp_path, "a", *words)
    assert (run.metrics["headline"], run.metrics["num_clusters"]) == ("cluster", 12)
    lines = [record.getMessage() for record in caplog.records]
    shown = {line.split()[1].split("/")[0]: line.split()[3] for line in lines if line.startswith("step ")}
    rows = (run.folder / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("train/loss")
    kept = {row.split(",")[0]: row.split(",")[place] for row in rows[1:] if row.split(",")[place]}
    assert len(shown) == 8
    assert shown == {step: f"{float(value):.4f}" for step, value in kept.items()}
    assert any(line.startswith("validation at step 4: cluster/") for line in lines)

    caplog.clear()
    best = run.folder / "checkpoints" / "best.ckpt"
    step = run.metrics["best/step"]
    metrics = evaluating.evaluate(best, [])
    assert read_json(run.folder / "eval" / "best" / "metrics.json")["steps"] == metrics["steps"] == step
    assert any(f"validation at step {step}: " in record.getMessage() for record in caplog.records)
