"""Finished runs scored anew, and evaluations in comparisons."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import run
from common.errors import ConfigError
from engine import evaluating
from launch import finished
from tests.conftest import read_json

RULE = "scores finished runs anew; it takes keys of evaluation., data., trainer., search."


@pytest.fixture
def trained(small_run, tmp_path) -> list[Path]:
    """Two finished runs."""
    folders = []
    for name in ("kmeans_baseline", "hidden_positives"):
        shutil.copytree(small_run(name).folder, tmp_path / name, ignore=shutil.ignore_patterns("eval"))
        folders.append(tmp_path / name)
    return folders


def scores(folder: Path) -> dict[tuple[str, str], float]:
    """(method, probe) -> mIoU of the table."""
    with (folder / "table.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if (row["stage"], row["metric"]) == ("val", "miou")]
    return {(row["method"], row["probe"]): float(row["mean"]) for row in rows}


@pytest.mark.train
def test_runs_are_scored_anew_once_from_their_checkpoints(trained, tmp_path, capsys, monkeypatch):
    words = ["compare", f"runs={' '.join(map(str, trained))}", f"run.dir={tmp_path}", "name=x"]
    words += ["eval=evaluation.crf=dense"]
    assert run.main(words) == 0
    text = (tmp_path / "compare" / "x" / "table.md").read_text()
    assert "# Comparison: x (evaluation.crf=dense)" in text
    assert "crf False" not in text
    assert "10 iterations" in text
    found = scores(tmp_path / "compare" / "x")
    own = read_json(trained[1] / "metrics.json")
    assert found["hidden_positives", "cluster"] == pytest.approx(own["val/cluster/miou"], abs=1e-3)
    assert {("hidden_positives", "cluster_crf"), ("kmeans_baseline", "kmeans_crf")} <= set(found)
    assert "val/kmeans_crf/miou" not in own
    assert "No pictures of" not in (tmp_path / "compare" / "x" / "index.html").read_text()

    monkeypatch.setattr(evaluating, "evaluate_once", lambda *_: pytest.fail("what was evaluated is evaluated again"))
    assert run.main(words) == 0
    assert scores(tmp_path / "compare" / "x") == found
    changed = trained[0] / "checkpoints" / "last.ckpt"
    changed.write_bytes(changed.read_bytes() + b"x")  # another checkpoint: its old scores are not its own
    (kept,) = (trained[0] / "eval").iterdir()
    assert not evaluating.is_kept(kept, changed, ["evaluation.crf=dense"])


@pytest.mark.train
def test_best_checkpoints_are_scored_where_they_are_asked_for(trained, tmp_path, capsys):
    words = ["compare", f"runs={trained[1]}", f"run.dir={tmp_path}", "checkpoint=best"]
    assert run.main([*words, "name=x"]) == 0
    text = (tmp_path / "compare" / "x" / "table.md").read_text()
    assert "# Comparison: x (checkpoint=best)" in text
    assert "Scores of the best checkpoint, percent" in text
    assert "last step" not in text
    own = read_json(trained[1] / "metrics.json")
    assert f"| hidden_positives | tiny | 0 | {own['best/step']} | 4 | choice of best |" in text
    assert scores(tmp_path / "compare" / "x")["hidden_positives", "cluster"] == pytest.approx(
        own["best/cluster/miou"], abs=1e-3
    )
    (trained[1] / "checkpoints" / "best.ckpt").unlink()
    assert run.main([*words, "name=y", "eval=evaluation.flip=true"]) == 2
    assert f"ckpt={trained[1]}/checkpoints/best.ckpt: no such file" in capsys.readouterr().err


@pytest.mark.train
def test_a_run_that_cannot_be_scored_is_missing(trained, tmp_path, capsys):
    (trained[0] / "checkpoints" / "last.ckpt").unlink()
    words = ["compare", f"run.dir={tmp_path}", "name=x", "eval=evaluation.flip=true"]
    with pytest.raises(SystemExit) as stopped:
        run.main([*words, f"runs={' '.join(map(str, trained))}"])
    assert stopped.value.code == 1
    page = (tmp_path / "compare" / "x" / "index.html").read_text()
    assert "<b>Missing:</b> kmeans_baseline, seed 0, kmeans_baseline: ckpt=" in page
    assert "flip True" in page
    assert run.main([*words, f"runs={trained[0]}"]) == 2
    assert "error: compare: no run could be scored anew; first: kmeans_baseline, seed 0" in capsys.readouterr().err


@pytest.mark.train
def test_evaluations_stand_in_comparisons(trained, tmp_path, capsys):
    for name in ("last", "best"):
        evaluating.evaluate(trained[1] / "checkpoints" / f"{name}.ckpt", ["evaluation.flip=true"])
    folders = [trained[1], *(trained[1] / "eval" / name for name in ("last", "best"))]
    whole, last, best = (finished.read_run(folder) for folder in folders)
    assert (last.folder, last.tables, last.shown) == (trained[1], folders[1], "hidden_positives/eval/last")
    assert last.metrics["train_images_per_second"] == whole.metrics["train_images_per_second"]
    assert last.history("val/cluster/miou") == whole.history("val/cluster/miou")
    assert last.config["evaluation.flip"] is True
    assert last.config["trainer.devices"] == whole.config["trainer.devices"]
    assert run.main(["compare", f"runs={' '.join(map(str, folders))}", f"run.dir={tmp_path}", "name=x"]) == 0
    text = (tmp_path / "compare" / "x" / "table.md").read_text()
    assert "**not comparable with protocol 1**: flip: False -> True" in text
    assert "left out" not in (tmp_path / "compare" / "x" / "index.html").read_text()
    step = whole.metrics["best/step"]
    assert "| hidden_positives | tiny | 0 | 8 | 4 | none |" in text
    assert f"| hidden_positives (checkpoint=best.ckpt) | tiny | 0 | {step} | 4 | choice of best |" in text
    assert best.read_from == trained[1] / "checkpoints" / "best.ckpt"


@pytest.mark.train
def test_evaluations_of_before_are_read_and_those_of_sizes_refused(trained):
    last = trained[0] / "checkpoints" / "last.ckpt"
    evaluating.evaluate(last, [])
    folder = trained[0] / "eval" / "last"
    for name in ("config.yaml", "environment.json", evaluating.RECORD):
        (folder / name).unlink()
    old = json.loads((folder / "metrics.json").read_text())
    old.pop("headline")
    (folder / "metrics.json").write_text(json.dumps(old))
    found = finished.read_run(folder)
    assert (found.metrics["headline"], found.words, found.read_from) == ("kmeans", (), last)
    evaluating.evaluate(last, ["evaluation.resolutions=[48,64]"])
    with pytest.raises(ConfigError) as caught:
        finished.read_run(trained[0] / "eval" / "last@48+64")
    assert str(caught.value) == (
        f"runs: {trained[0]}/eval/last@48+64 holds scores at several resolutions; evaluate at one of them "
        "(data.eval_size), or leave it out"
    )


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("seed=3", f"eval: seed=3: {RULE}"),
        ("method.dim=3", f"eval: method.dim=3: {RULE}"),
        ("evaluation.crff=dense", "evaluation.crff: no such key; did you mean evaluation.crf?"),
        ("evaluation.crf=x", "evaluation.crf=x: not one of none, dense"),
        ("dense", "dense: expected key=value, as in method=hidden_positives or seed=3"),
        (
            "evaluation.resolutions=[48]",
            "eval: evaluation.resolutions=[48]: a table has one resolution; name it with data.eval_size",
        ),
    ],
)  # fmt: skip
def test_wrong_words_end_before_the_first_training(capsys, monkeypatch, tmp_path, word, line):
    monkeypatch.chdir(tmp_path)
    assert run.main(["compare", "methods=stego", f"eval={word}"]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"
    assert list(tmp_path.iterdir()) == []
