"""Tables and files, to the letter."""

import csv
import json

import numpy as np
import pytest
import torch

from common.spec import ClassMeta
from evaluation import matching
from reporting import report

META = ClassMeta(("sky", "road", "tree"), ((10, 20, 200), (90, 90, 90), (20, 160, 30)))
COUNTS = np.array([[0, 9, 0], [30, 0, 0], [0, 1, 0], [6, 4, 0]])


def scores(**policy):
    return matching.score(COUNTS, **policy)


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_flatten_gives_percent_and_null():
    flat = report.flatten("val", "cluster", scores(extra="drop"))
    assert flat == {"val/cluster/acc": 78.0, "val/cluster/miou": pytest.approx((100 * 30 / 36 + 100 * 9 / 14) / 3)}
    empty = matching.score(np.zeros((2, 2), dtype=int))
    assert report.flatten("best", "own", empty) == {"best/own/acc": None, "best/own/miou": None}
    free = {"entropy": float("nan"), "confidence": np.float64(3)}
    assert report.flatten("val", "cluster", free) == {"val/cluster/entropy": None, "val/cluster/confidence": 3.0}


def test_flatten_tells_groups_of_classes_apart():
    result = scores(matching="many_to_one")  # clusters 1 and 3 are sky, 0 and 2 road; no tree
    flat = report.flatten("val", "own", result, {"things": (1, 2), "stuff": (0,)})
    assert flat == {
        "val/own/acc": 92.0,
        "val/own/miou": pytest.approx((90 + 100 * 10 / 14) / 2),
        "val/own/acc_things": pytest.approx(100 * 10 / 14),
        "val/own/miou_things": pytest.approx(100 * 10 / 14),
        "val/own/acc_stuff": 100.0,
        "val/own/miou_stuff": 90.0,
    }
    within = report.flatten("val", "own", result, {"stuff": (0,)}, restricted=True)
    assert within["val/own/miou_stuff"] == 100.0
    assert report.flatten("val", "own", result, {"things": (2,)})["val/own/miou_things"] is None


def test_write_json_never_holds_nan_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / "metrics.json"
    report.write_json(path, {"a": float("nan"), "b": [torch.tensor(2), float("inf")], "c": {"d": np.int64(4)}})
    assert path.read_text() == '{\n  "a": null,\n  "b": [\n    2,\n    null\n  ],\n  "c": {\n    "d": 4\n  }\n}\n'
    report.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}  # the old file stays whole
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.json"]


def test_clusters_csv(tmp_path):
    result = scores(extra="drop")
    report.clusters_csv(tmp_path / "clusters.csv", result, META)
    assert rows_of(tmp_path / "clusters.csv") == [
        ["cluster", "class_id", "class", "pixels", "share"],
        ["0", "1", "road", "9", "100.0000"],
        ["1", "0", "sky", "30", "100.0000"],
        *(
            [str(k), "2", "tree", str(n), "0.0000"] if result.mapping[k] == 2 else [str(k), "-1", "", str(n), ""]
            for k, n in ((2, 1), (3, 10))
        ),
    ]
    report.clusters_csv(tmp_path / "clusters.csv", scores(matching="many_to_one"), META)
    assert rows_of(tmp_path / "clusters.csv")[4] == ["3", "0", "sky", "10", "60.0000"]


def test_per_class_files(tmp_path):
    results = {"cluster": scores(matching="many_to_one"), "kmeans": scores(matching="many_to_one", absent="zero")}
    report.per_class_csv(tmp_path / "classes.csv", results, META)
    assert rows_of(tmp_path / "classes.csv") == [
        ["class_id", "class", "pixels", "cluster", "kmeans"],
        ["0", "sky", "36", "90.0000", "90.0000"],
        ["1", "road", "14", "71.4286", "71.4286"],
        ["2", "tree", "0", "", "0.0000"],
    ]
    told = ClassMeta(META.names, META.palette, things=(2,))
    report.per_class_csv(tmp_path / "told.csv", results, told)
    assert [row[:4] for row in rows_of(tmp_path / "told.csv")] == [
        ["class_id", "class", "group", "pixels"],
        ["0", "sky", "stuff", "36"],
        ["1", "road", "stuff", "14"],
        ["2", "tree", "things", "0"],
    ]
    text = report.as_text(report.per_class_table(results, META))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]
    assert ["tree", "0.0", "-", "0.0"] in lines
    assert ["mean", "", "80.7", "53.8"] in lines


def table_rows(metrics):
    table = report.final_table(metrics)
    cells = zip(*[list(column.cells) for column in table.columns], strict=True)
    return [column.header for column in table.columns], [list(row) for row in cells]


def test_final_table_orders_probes_and_shows_the_best():
    metrics = {
        "val/linear/acc": 90.04, "val/linear/miou": 60.0, "val/cluster/acc": 50.0, "val/cluster/miou": None,
        "val/kmeans/acc": 40.0, "val/kmeans/miou": 30.0, "val/cluster/entropy": 99.0, "best/cluster/miou": 45.0,
        "val/cluster_crf/miou": 46.0, "seed": 3, "protocol/crop/x/miou": 1.0,
    }  # fmt: skip
    header, rows = table_rows(metrics)
    assert header == ["probe", "acc", "mIoU", "best acc", "best mIoU"]
    assert rows == [
        ["cluster", "50.0", "-", "-", "45.0"],
        ["kmeans", "40.0", "30.0", "-", "-"],
        ["linear", "90.0", "60.0", "-", "-"],
        ["cluster_crf", "-", "46.0", "-", "-"],
    ]


def test_final_table_shows_the_spread_of_a_read_out_that_has_several_runs():
    metrics = {"val/overcluster_9/acc": 50.0, "val/overcluster_9/miou": 40.04, "val/overcluster_9/miou_std": 1.26,
               "val/cluster/miou": 12.0, "val/cluster/acc": 30.0}  # fmt: skip
    shown = report.as_text(report.final_table(metrics))
    assert "40.0 ± 1.3" in shown
    assert "50.0 ±" not in shown


def test_final_table_of_several_resolutions():
    metrics = {
        "val@320/cluster/acc": 50.0, "val@320/cluster/miou": 20.0, "val@320/cluster/entropy": 99.0,
        "val@448/linear/acc": 70.0, "val@448/linear/miou": 40.0, "val@448/cluster/miou": 21.0,
        "protocol@320/crop": "none",
    }  # fmt: skip
    header, rows = table_rows(metrics)
    assert header == ["px", "probe", "acc", "mIoU"]
    assert rows == [
        ["320", "cluster", "50.0", "20.0"],
        ["448", "cluster", "-", "21.0"],
        ["448", "linear", "70.0", "40.0"],
    ]


def test_final_table_without_labels_shows_the_label_free_scores():
    header, rows = table_rows({"val/cluster/entropy": 97.25, "val/cluster/confidence": 31.0, "method": "x"})
    assert header == ["probe", "entropy", "confidence"]
    assert rows == [["cluster", "97.2", "31.0"]]


@pytest.mark.parametrize(("rule", "more"), [("last step", []), ("highest val/cluster/miou", ["best acc", "best mIoU"])])
def test_the_best_is_no_column_where_it_is_the_last_step_by_rule(rule, more):
    metrics = {"val/cluster/miou": 20.0, "best/cluster/miou": 20.0, "selection/rule": rule}
    assert table_rows(metrics)[0] == ["probe", "acc", "mIoU", *more]


def test_write_scores_fills_the_run_folder(tmp_path):
    report.write_scores(tmp_path, {"cluster": scores(), "linear": matching.score(COUNTS[:3], "identity")}, META)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["classes.csv", "clusters.csv", "confusion.png"]
