"""The best checkpoint is scored with every read-out when a run ends, once, whatever stopped the run before."""

import csv

import pytest

import config
from engine import closing, evaluating, training
from engine.callbacks.run_keeper import RunKeeper
from engine.records import recipes
from tests.conftest import Run, read_json, run_small
from tests.test_ddp import ROOT, run_two

pytestmark = pytest.mark.train

WORDS = (
    "evaluation.select=val/linear/acc", "evaluation.panels=1", "evaluation.kmeans.pictures=4", "trainer.val_every=2",
    "trainer.max_steps=6", "method.pool.size=16",
)  # fmt: skip
EARLY = {"val/linear/acc": 101.0}
"""No later step reaches it."""


@pytest.fixture
def second_step_wins(monkeypatch):
    """The validation at step 2 is taken for one with the highest accuracy."""
    real = RunKeeper.offer
    monkeypatch.setattr(
        RunKeeper, "offer", lambda self, step, values: real(self, step, values | (EARLY if step == 2 else {}))
    )


def best_of(run: Run, probe: str, name: str) -> tuple[float, float]:
    return run.metrics[f"best/{probe}/{name}"], run.metrics[f"val/{probe}/{name}"]


def test_the_best_checkpoint_has_every_read_out(second_step_wins, tmp_path, monkeypatch):
    words = (*WORDS, "evaluation.crf=dense", "evaluation.crf_constants.iterations=2", "evaluation.flip=true")
    run = run_small("hidden_positives", tmp_path, "r", *words)
    assert (run.metrics["best/step"], run.metrics["steps"]) == (2, 6)
    for probe in ("cluster", "kmeans", "linear", "cluster_crf", "kmeans_crf", "linear_crf"):
        assert {f"{stage}/{probe}/{name}" for stage in ("best", "val") for name in ("acc", "miou")} <= set(run.metrics)
    assert best_of(run, "cluster", "confidence")[0] != best_of(run, "cluster", "confidence")[1]
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/linear/acc"]]
    assert [row["step"] for row in rows] == ["2", "4", "6"]

    # `eval` of the file gives the same, with the centroids that it holds, and a second end of the run too.
    monkeypatch.setattr("engine.fitting.kmeans.fit_distributed", lambda *_, **__: pytest.fail("fitted again"))
    again = evaluating.evaluate(run.folder / "checkpoints" / "best.ckpt", [])
    found = {key.replace("val/", "best/", 1): value for key, value in again.items() if key.startswith("val/")}
    assert found == {key: value for key, value in run.metrics.items() if key.startswith("best/") and key != "best/step"}


def test_a_best_checkpoint_that_is_the_last_is_scored_once(tmp_path, monkeypatch):
    monkeypatch.setattr(closing, "score_best", lambda *_: pytest.fail("scored twice"))
    run = run_small("kmeans_baseline", tmp_path, "r", "trainer.max_steps=2", "evaluation.panels=0")
    best = {key.replace("best/", "val/", 1): value for key, value in run.metrics.items() if key.startswith("best/")}
    assert best.pop("val/step") == 2
    assert best == {key: value for key, value in run.metrics.items() if key.startswith("val/")}


def test_a_run_killed_while_its_best_is_scored_ends_alike(second_step_wins, tmp_path, monkeypatch):
    plain = run_small("hidden_positives", tmp_path, "plain", *WORDS)

    class StopError(Exception):
        pass

    def dies(*_):
        raise StopError

    with monkeypatch.context() as patch:
        patch.setattr(training.closing, "score_best", dies)
        with pytest.raises(StopError):
            run_small("hidden_positives", tmp_path, "killed", *WORDS)
    resumed = run_small("hidden_positives", tmp_path, "killed", *WORDS)
    timed = ("train_images_per_second",)
    assert {k: v for k, v in resumed.metrics.items() if k not in timed} == {
        k: v for k, v in plain.metrics.items() if k not in timed
    }


def test_figures_of_a_recipe_stand_beside_the_best():
    words = ["experiment=stego_potsdam3_vits8", "data.root=x", "backbone.weights=none"]
    settings = config.flatten(config.compose(words))
    figures = {"published/cluster_crf/acc": 77.0, "published/source": "STEGO, ICLR 2022"}
    assert recipes.published_figures(settings) == figures
    assert recipes.published_figures(settings | {"optim.head.lr": 1.0}) == {}


SCRIPT = """import sys
import run
from engine.callbacks.run_keeper import RunKeeper
real = RunKeeper.offer
RunKeeper.offer = lambda self, step, values: real(self, step, values | ({"val/linear/acc": 101.0} if step == 2 else {}))
sys.exit(run.main(sys.argv[1:]))
"""


@pytest.mark.ddp
def test_two_processes_score_the_best(tmp_path, monkeypatch):
    """Each rank reads the file, and rank zero alone writes it; one process gives the same scores of it."""
    (tmp_path / "run2.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = run_two("hidden_positives", tmp_path, *WORDS, script=tmp_path / "run2.py")
    metrics = read_json(folder / "metrics.json")
    assert (metrics["best/step"], metrics["steps"]) == (2, 6)
    again = evaluating.evaluate(folder / "checkpoints" / "best.ckpt", [])
    for key in ("cluster/miou", "linear/acc", "kmeans/miou", "cluster/entropy"):
        assert metrics[f"best/{key}"] == pytest.approx(again[f"val/{key}"], abs=0.2), key
