"""The rules that choose the best checkpoint."""

import csv

import pytest

import config
from common.errors import ConfigError
from engine import setup
from engine.callbacks import selection
from engine.callbacks.selection import Selection
from tests.conftest import run_small, small_words

FOUR = {"val/cluster/miou": 10.0, "val/cluster/acc": 30.0, "val/linear/miou": 20.0, "val/linear/acc": 60.0}


def chosen(select: str, labels: bool = True, method: str = "kmeans_baseline") -> Selection:
    """The rule for a small run, on scenes, or on the same data without names."""
    cfg, data = setup.build_data(config.compose(small_words(method, f"evaluation.select={select}")))
    meta = data.meta if labels else type(data.meta)()
    return selection.choose(cfg, setup.build_model(cfg, meta))


def refusal(select: str, labels: bool = True) -> str:
    with pytest.raises(ConfigError) as caught:
        chosen(select, labels)
    return str(caught.value)


def test_the_sum_of_four_is_that_of_hidden_positives():
    rule = chosen("sum_of_four")
    assert rule.value(FOUR) == 120.0
    assert rule.value({**FOUR, "val/kmeans/miou": 90.0}) == 120.0
    assert rule.value({"val/cluster/miou": 10.0}) is None
    assert rule.uses_labels
    assert rule.rule == ("highest sum_of_four: val/cluster/miou + val/cluster/acc + val/linear/miou + val/linear/acc")


def test_the_own_sum_is_that_of_transfgu():
    cfg, data = setup.build_data(config.compose(small_words("transfgu", "evaluation.select=own_sum")))
    rule = selection.choose(cfg, setup.build_model(cfg, data.meta))
    assert rule.value({**FOUR, "val/own/miou": 20.0, "val/own/acc": 50.0}) == 70.0
    assert rule.rule == "highest own_sum: val/own/miou + val/own/acc"
    assert rule.uses_labels
    assert refusal("own_sum") == (
        "evaluation.select=own_sum: adds up val/own/miou and val/own/acc, and method=kmeans_baseline has no classifier "
        "of its own; use one of auto, sum_of_four, val/cluster/acc, val/cluster/miou, val/linear/acc, val/linear/miou, "
        "val/cluster/entropy, val/cluster/confidence"
    )


def test_rules_of_one_score_and_of_none():
    assert chosen("auto") == Selection()  # the baseline trains nothing, so no step is better than another
    for method, headline in (("stego", "cluster"), ("transfgu", "own")):
        assert chosen("auto", method=method) == Selection((f"val/{headline}/miou",))
        assert chosen("auto", labels=False, method=method) == Selection()
    assert chosen("auto", method="stego").rule == "highest val/cluster/miou"
    assert chosen("val/linear/acc").uses_labels
    entropy = chosen("val/cluster/entropy", labels=False)
    assert (entropy.rule, entropy.uses_labels) == ("highest val/cluster/entropy", False)
    last = chosen("auto", labels=False)
    assert (last.rule, last.uses_labels, last.keys) == ("last step", False, ())


def test_rules_that_cannot_be_kept_end_in_one_line():
    assert refusal("val/kmeans/miou") == (
        "evaluation.select=val/kmeans/miou: expected one of auto, sum_of_four, val/cluster/acc, val/cluster/miou, "
        "val/linear/acc, val/linear/miou, val/cluster/entropy, val/cluster/confidence"
    )
    assert refusal("sum_of_four", labels=False) == (
        "evaluation.select=sum_of_four: adds up scores that need labels, and the data has none; "
        "use auto (the last step) or one of val/cluster/entropy, val/cluster/confidence"
    )
    assert refusal("sum_of_for", labels=False) == (
        "evaluation.select=sum_of_for: expected one of auto, val/cluster/entropy, val/cluster/confidence"
    )


@pytest.mark.train
def test_a_run_is_chosen_by_the_sum(tmp_path):
    """The best of three validations by the sum, read from the history, and named in metrics.json."""
    run = run_small("hidden_positives", tmp_path, "s", "evaluation.select=sum_of_four", "trainer.val_every=2")
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/cluster/miou"]]
    sums = {int(row["step"]): sum(float(row[key]) for key in FOUR) for row in rows}
    assert len(sums) == 4
    assert run.metrics["best/step"] == max(sums, key=lambda step: (sums[step], step))
    best = sum(run.metrics[key.replace("val/", "best/")] for key in FOUR)
    assert best == pytest.approx(max(sums.values()), abs=1e-3)
    assert run.metrics["selection/rule"].startswith("highest sum_of_four: ")
    assert run.metrics["selection/uses_labels"] is True


@pytest.mark.train
def test_the_mirrored_picture_counts_at_the_end_and_chooses_nothing(tmp_path):
    """With evaluation.flip the validations of the training are those without it, the last step has one as well, and
    the best is chosen by them; the closing scores are those with it."""
    words = ("trainer.val_every=2", "trainer.max_steps=6", "evaluation.panels=0")
    plain = run_small("hidden_positives", tmp_path, "plain", *words)
    flipped = run_small("hidden_positives", tmp_path, "flipped", "evaluation.flip=true", *words)
    history = [validations(run) for run in (plain, flipped)]
    assert history[0][:2] == history[1][:2]
    assert flipped.metrics["val/cluster/confidence"] != plain.metrics["val/cluster/confidence"]
    assert flipped.metrics["best/step"] == plain.metrics["best/step"]


def validations(run) -> list[tuple[str, ...]]:
    """The rows of metrics.csv that hold the scores of a validation: step and cluster mIoU."""
    with (run.folder / "metrics.csv").open(newline="") as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/cluster/miou"]]
    return [(row["step"], row["val/cluster/miou"], row["val/cluster/confidence"]) for row in rows]
