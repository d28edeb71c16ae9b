"""Leopart's read-outs in runs: scored at the end, reproduced by eval, the same from two processes, label-free."""

import pytest
import torch

import config
from common.errors import ConfigError
from common.spec import ClassMeta
from datamodules.scenes.module import SceneSource
from engine import evaluating, setup
from engine.overclustering import OverclusterFit
from evaluation.overclustering.readout import configured
from tests.conftest import read_json, run_small, small_words
from tests.test_ddp import run_two

ASKED = [
    "trainer.max_steps=2", "evaluation.overcluster.k=[12,40]", "evaluation.overcluster.seeds=2",
    "evaluation.overcluster.restarts=1", "evaluation.cbfe.clusters=20", "evaluation.communities.clusters=15",
    "evaluation.communities.seeds=2",
]  # fmt: skip
LABELLED = [
    "evaluation.cbfe.train_pictures=6", "evaluation.cbfe.cut=labels", "evaluation.communities.search=labels",
    "evaluation.communities.trials=2",
]  # fmt: skip
ROWS = ("overcluster_", "cbfe", "communities")


def found(metrics, stage="val"):
    return {key: value for key, value in metrics.items() if key.startswith(tuple(f"{stage}/{row}" for row in ROWS))}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_small("kmeans_baseline", tmp_path_factory.mktemp("asked"), "x", *ASKED)


@pytest.mark.train
def test_a_run_scores_them_and_eval_reproduces_it(run):
    own = found(run.metrics)
    scored = [f"val/{row}/{name}" for row in ("overcluster_12", "overcluster_40", "cbfe", "communities")
              for name in ("acc", "acc_std", "miou", "miou_std")]  # fmt: skip
    assert set(own) == {*scored, "val/cbfe/share", "val/cbfe/iou", "val/communities/count"}
    assert 0 < own["val/overcluster_12/miou"] < own["val/overcluster_40/miou"] <= 100
    assert "hungarian by IoU, 2 seeds" in run.metrics["protocol/overcluster_12"]
    assert "many-to-one by precision" in run.metrics["protocol/overcluster_40"]
    assert "precision 0.5, fixed" in run.metrics["protocol/cbfe"]
    assert "15 clusters, louvain, weight 0.09, time 2 (fixed)" in run.metrics["protocol/communities"]
    last = run.folder / "checkpoints" / "last.ckpt"
    assert found(evaluating.evaluate(last, [])) == own
    sizes = evaluating.evaluate(last, ["evaluation.resolutions=[48,32]"])
    assert found(sizes, "val@48") == {key.replace("val/", "val@48/"): value for key, value in own.items()}
    assert found(sizes, "val@32").keys() == {key.replace("val/", "val@32/") for key in own}


@pytest.mark.train
def test_panels_show_them(run):
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", *ASKED)))
    model = setup.restore_model(run.checkpoint, cfg, data.meta)
    batch = next(iter(data.loader("val")))
    trainer = setup.build_trainer(cfg, 1, [OverclusterFit(cfg, data)], [], run.folder)
    setup.connect(model, data)
    trainer.validate(model, data, verbose=False)
    with torch.inference_mode():
        maps = model.validation_step(batch, 0)
    for name, most in (("overcluster_12", 12), ("noisy foreground", 2), ("foreground", 2), ("communities", 12)):
        assert maps[name].shape == batch["label"].shape
        assert maps[name].min() >= 0
        assert maps[name].max() < most


@pytest.mark.train
def test_labels_choose_by_name_alone(tmp_path):
    metrics = run_small("kmeans_baseline", tmp_path, "x", *ASKED[:1], *ASKED[3:], *LABELLED).metrics
    rows = {key.split("/")[1] for key in found(metrics)}
    assert rows == {"cbfe_labelled", "communities_labelled"}
    for row in rows:
        assert "chosen by labels of training pictures" in metrics[f"protocol/{row}"]
    assert "(chosen by labels of training pictures in 2 trials)" in metrics["protocol/communities_labelled"]


@pytest.mark.train
def test_labels_are_not_read_where_they_are_not_named(tmp_path, monkeypatch):
    """Labels of all pictures are exchanged for one class: what does not compare with labels stays as it is."""
    words = [*ASKED, "evaluation.cbfe.train_pictures=6"]
    clean = run_small("kmeans_baseline", tmp_path, "clean", *words).metrics
    plain = SceneSource.read
    monkeypatch.setattr(SceneSource, "read", lambda self, index: (plain(self, index)[0], plain(self, index)[1] * 0))
    spoilt = run_small("kmeans_baseline", tmp_path, "spoilt", *words).metrics
    assert "val/overcluster_40/miou" not in spoilt
    for key in ("val/cbfe/share", "val/communities/count"):
        assert spoilt[key] == clean[key]


@pytest.mark.ddp
def test_two_processes_find_what_one_finds(run, tmp_path):
    two = read_json(run_two("kmeans_baseline", tmp_path, *ASKED) / "metrics.json")
    assert found(two) == pytest.approx(found(run.metrics), abs=1e-4)


META = ClassMeta(("background", "car", "person"))


@pytest.mark.parametrize(
    ("words", "meta", "message"),
    [
        (["overcluster.k=[9]"], ClassMeta(), "evaluation.overcluster.k=[9]: these clusters are matched with labels"),
        (["communities.clusters=9"], META, "evaluation.communities.clusters=9: they are clusters of the foreground"),
        (
            ["cbfe.clusters=9", "cbfe.cut=labels"],
            META,
            "evaluation.cbfe.cut=labels: labels of training pictures choose",
        ),
        (
            ["cbfe.clusters=2", "cbfe.cut=labels", "cbfe.train_pictures=5"],
            META,
            "evaluation.cbfe.clusters=2: labels choose among 3 clusters or more",
        ),
        (
            ["cbfe.clusters=9", "cbfe.cut=labels", "cbfe.train_pictures=5"],
            ClassMeta(("road", "sky")),
            "evaluation.cbfe.cut=labels: the data does not say which classes are objects",
        ),
        (
            ["cbfe.clusters=9", "communities.clusters=9", "communities.search=labels"],
            META,
            "evaluation.communities.search=labels: labels of training pictures choose",
        ),
    ],
)
def test_what_does_not_go_together(words, meta, message):
    cfg = config.compose(["method=kmeans_baseline", *(f"evaluation.{word}" for word in words)])
    with pytest.raises(ConfigError) as caught:
        configured(cfg, meta)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["evaluation.overcluster.k=[9000]"],
            "evaluation.overcluster.k=9000: needs a code a cluster, and 5 validation",
        ),
        (
            ["evaluation.cbfe.clusters=9", "evaluation.cbfe.masks=attention"],
            "evaluation.cbfe.masks=attention: backbone=",
        ),
    ],
)
def test_what_is_refused_before_a_picture_is_read(words, message):
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", *words, "backbone=resnet18",
                                                            "backbone.weights=none")))  # fmt: skip
    model = setup.build_model(cfg, data.meta)
    with pytest.raises(ConfigError) as caught:
        OverclusterFit(cfg, data).check(model)
    assert str(caught.value).startswith(message)


def test_nothing_is_there_unless_it_is_asked_for():
    assert configured(config.compose(["method=kmeans_baseline"]), META) == []
