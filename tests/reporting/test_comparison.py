"""Which runs stand side by side, and what their numbers become."""

import csv
import json
import statistics
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest

from common.errors import ConfigError
from reporting import charts, comparison, comparison_page, comparison_tables
from reporting.comparison import Finished, Score
from reporting.comparison_tables import STAGES
from reporting.page import ENVIRONMENT


def finished(method="stego", seed=0, miou=20.0, folder="r", config=None, **metrics) -> Finished:
    settings = {
        "method.name": method, "method.num_clusters": 12, "data.name": "scenes", "data.root": None, "seed": seed,
        "data.train_size": 128, "data.val_count": 5, "run.name": folder, "trainer.max_steps": 8,
        "data.batch_size": 16, **(config or {}),
    }  # fmt: skip
    facts = {
        "method": method, "seed": seed, "backbone": "tiny", "data": "scenes", "steps": 8, "uses_labels": False,
        "selection/rule": "last step", "selection/uses_labels": False, "protocol/crop": "none", "protocol/crf": False,
        "val/cluster/acc": 2 * miou, "val/cluster/miou": miou, "best/cluster/miou": miou + 1,
        "train_images_per_second": 10.0, **metrics,
    }  # fmt: skip
    environment = {"device": "cpu", "processes": 1, "peak_memory": {"resident_mib": 100.0 + seed}, "seconds": 1.0}
    return Finished(Path(folder), facts, settings, environment)


def drawn(template: str, macro: str, data: object) -> str:
    """What a macro of the templates makes of a part of a page."""
    return str(getattr(ENVIRONMENT.get_template(f"{template}.html.j2").module, macro)(data))


def test_seeds_are_one_row_with_mean_and_sample_deviation():
    (section,) = comparison.arrange(
        [finished(seed=2, miou=26.0), finished(seed=0, miou=20.0), finished(seed=1, miou=23.0)]
    )
    (entry,) = section.entries
    assert entry.seeds == [0, 1, 2]
    score = entry.score("val/cluster/miou")
    assert (score.mean, score.count) == (23.0, 3)
    assert score.spread == pytest.approx(statistics.stdev([20, 23, 26]))
    assert score.text() == "23.0 ± 3.0"
    assert entry.score("val/linear/miou") is None
    entry.runs[1].metrics["best/kmeans/miou"] = 40.0
    assert entry.score("best/kmeans/miou") is None  # that of one seed is no score of three
    assert (Score.of([5.0]).text(), Score.of([5.0, 6.0]).text()) == ("5.0", "5.5 (n=2)")
    assert section.columns() == [("cluster", "acc"), ("cluster", "miou")]
    assert comparison_tables.memory_text(entry) == "102 host"


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (finished("hp", **{"protocol/crf": "10 iterations"}), "crf: False -> 10 iterations"),
        (finished("hp", config={"method.num_clusters": 27}), "clusters: 12 -> 27"),
        (finished("hp", config={"data.val_count": 9}), "data.val_count: 5 -> 9"),
        (finished("hp", **{"protocol/flip": True}), "flip: not set -> True"),
    ],
)
def test_another_protocol_is_another_section_and_has_a_name(other, difference):
    first, second = comparison.arrange([finished(), other])
    assert first.differs == []
    assert second.differs == [difference]
    text = comparison_tables.markdown([first, second], "T")
    assert f"**not comparable with protocol 1**: {difference}" in text
    assert text.index("## Protocol 1") < text.index("stego") < text.index("## Protocol 2") < text.index("| hp |")
    assert text.count("Scores of the last step") == 2
    assert comparison_tables.escape(difference) in comparison_tables.latex([first, second], "T")


def test_a_protocol_leaves_out_keys_that_ask_for_nothing():
    config = {"data.label_values": {}, "data.value_range": None, "data.label_suffix": "", "data.images": "auto"}
    (section,) = comparison.arrange([finished(config=config)])
    said = "clusters 12, crop none, crf False"
    assert f"Protocol: data.name scenes, data.val_count 5, {said}.\n" in comparison_tables.markdown([section], "T")
    assert comparison_tables.caption(section).endswith(f"Protocol: data.val count 5, {said}.")


def test_training_differs_without_another_protocol():
    runs = [finished(), finished("hp", config={"data.train_size": 64}), finished(config={"trainer.max_steps": 9})]
    (section,) = comparison.arrange(runs)
    assert [entry.label for entry in section.entries] == ["stego", "hp", "stego (trainer.max_steps=9)"]
    assert section.notes() == []


def test_readouts_of_one_run_alone_are_no_other_protocol_but_a_note_where_they_differ():
    posthoc = "protocol/linear_posthoc"
    (section,) = comparison.arrange(
        [finished(), finished("a", **{posthoc: "5 epochs"}), finished("b", **{posthoc: "9"})]
    )
    assert section.notes() == ["linear_posthoc differs between these runs: 5 epochs | 9"]
    over = "protocol/overcluster_21"
    (section,) = comparison.arrange([finished(), finished("a", **{over: "5 seeds"}), finished("b", **{over: "1 seed"})])
    assert section.notes() == ["overcluster_21 differs between these runs: 1 seed | 5 seeds"]
    (section,) = comparison.arrange([finished(), finished("a", **{"selection/rule": "sum of four"})])
    assert section.notes() == ["the best checkpoint was chosen by different rules: last step | sum of four"]


def test_tables_to_paste():
    runs = [finished(seed=0, miou=20.0), finished(seed=1, miou=22.0), finished("k_means", miou=21.5)]
    sections = comparison.arrange(runs)
    sections[0].entries[0].published = {"cluster/miou": 24.5}
    sections[0].entries[0].source = "A & B, 2022"
    text = comparison_tables.markdown(sections, "T")
    assert (
        "| stego | tiny | 0 1 | 8 | 16 | none | 42.0 (n=2) | 21.0 (n=2) | 10.0 | 101 host "
        "| cluster 24.5 mIoU (A & B, 2022) |"
    ) in text
    assert "| k_means | tiny | 0 | 8 | 16 | none | 43.0 | 21.5 | 10.0 | 100 host |  |" in text
    tex = comparison_tables.latex(sections, "T")
    assert r"stego & 2 & 8 & 16 & $42.0$ & $21.0$ \\" in tex
    assert r"k\_means & 1 & 8 & 16 & $43.0$ & $21.5$ \\" in tex
    assert r"\multicolumn{6}{l}{\quad published: cluster 24.5 mIoU (A \& B, 2022)} \\" in tex
    assert tex.count("{") == tex.count("}")
    rows = list(csv.DictReader(StringIO(comparison_tables.as_csv(sections))))
    (row,) = [row for row in rows if (row["method"], row["stage"], row["metric"]) == ("stego", "val", "miou")]
    assert (float(row["mean"]), row["std"], row["runs"], row["published"]) == (21.0, "", "2", "24.5")
    assert (row["steps"], row["batch"], row["headline"]) == ("8", "16", "cluster")
    page = drawn("parts", "table", comparison_page.scores(sections[0], "val", "val1"))
    assert 'data-sort="">steps</th><th class="number" data-sort="">batch</th>' in page
    cells = 'data-value="8">8</td><td class="number" data-value="16">16</td><td>none</td>'
    assert page.count(cells) == 2
    assert 'class="number best"' not in page


def three(method="stego", scores=(20.0, 22.0, 24.0), **metrics) -> list[Finished]:
    return [finished(method, seed=seed, miou=miou, **metrics) for seed, miou in enumerate(scores)]


@pytest.mark.parametrize(
    ("other", "bold"),
    [
        (three("hp", (26.1, 27.1, 28.1)), "hp"),  # ahead by 5.1, the spreads are 2 and 1
        (three("hp", (23.0, 24.0, 25.0)), None),  # ahead by 2, less than the spreads
        (three("hp", (40.0, 41.0)), None),  # nobody knows its spread
        (three("hp", (10.0, 10.0, 10.0)), "stego"),
    ],
)
def test_bold_is_what_is_ahead_by_more_than_the_spreads(other, bold):
    (section,) = comparison.arrange([*three(), *other])
    found = section.ahead("val", "cluster", "miou")
    assert (found and found.method) == bold
    tex = comparison_tables.latex([section], "T")
    page = drawn("parts", "table", comparison_page.scores(section, "val", "a"))
    assert ("\\mathbf" in tex) == ('class="number best"' in page) == bool(bold)
    assert r"stego & 3 & 8 & 16 & $" in tex
    assert r"\pm 2.0$" in tex


def test_latex_has_a_label_names_of_papers_and_no_paths():
    config = {"data.name": "folder", "data.root": "/home/me/my pictures/camvid"}
    first = [replace(run, title="STEGO") for run in three(config=config, **{"protocol/list": "val: /data/lists/x.txt"})]
    other = finished("hp", config={**config, "data.root": "/home/me/other"})
    tex = comparison_tables.latex(comparison.arrange([*first, other]), "Comparison: a_b")
    assert tex.count("\\caption{") == tex.count("\\label{") == 2
    assert "\\label{tab:comparison-a-b}" in tex
    assert "\\label{tab:comparison-a-b-2}" in tex
    assert "STEGO & 3" in tex
    for part in ("/", "home", "lists"):
        assert part not in tex, part
    assert "val: x.txt" in tex


def test_methods_are_known_by_their_own_scores():
    """The baseline's online probe stands nowhere as its score."""
    probes = {"val/kmeans/acc": 50.0, "val/kmeans/miou": 30.6}
    baseline = finished("kmeans_baseline", miou=11.7, headline="kmeans", **probes)
    other = finished("hp", miou=26.0, headline="cluster", **probes)
    (section,) = comparison.arrange([baseline, other])
    assert section.columns()[:2] == [("score", "miou"), ("kmeans", "acc")]
    assert section.probes() == ["score", "kmeans", "cluster"]
    tables = (comparison_tables.markdown([section], "T"), comparison_tables.latex([section], "T"))
    page = drawn("comparison_part", "protocol", comparison_page.part(1, section, comparison_page.Gallery({})))
    assert not [text for text in (*tables, page) if "11.7" in text]
    assert "| kmeans_baseline | tiny | 0 | 8 | 16 | none | kmeans | 30.6 | 50.0 | 30.6 | - | - |" in tables[0]
    assert "| hp | tiny | 0 | 8 | 16 | none | cluster | 26.0 | 50.0 | 30.6 | 52.0 | 26.0 |" in tables[0]
    assert "kmeans\\_baseline & k-means & 1" in tables[1]
    assert '<span class="what">kmeans_baseline: kmeans</span>' in page
    assert "11.7" in comparison_tables.as_csv([section])
    refined = [
        finished(m, headline=h, **probes, **{f"val/{h}_crf/miou": 40.0}) for m, h in (("a", "kmeans"), ("b", "cluster"))
    ]
    (section,) = comparison.arrange(refined)
    assert section.columns()[:2] == [("score", "miou"), ("score_crf", "miou")]
    assert [entry.cell("val", "score_crf", "miou").mean for entry in section.entries] == [40.0, 40.0]
    (alone,) = comparison.arrange([baseline])
    assert alone.columns() == [("kmeans", "acc"), ("kmeans", "miou")]


def test_a_training_that_is_there_twice_is_counted_once():
    runs = [finished(seed=0, folder="a"), finished(seed=1, folder="b"), finished(seed=0, folder="c", miou=30.0)]
    runs += [finished("hp", seed=0, folder="d"), finished(seed=0, folder="e", config={"trainer.max_steps": 9})]
    kept, twice = comparison.once(runs)
    assert [str(run.folder) for run in kept] == ["a", "b", "d", "e"]
    assert twice == ["c is left out: stego, seed 0 in the configuration of a"]


def test_a_published_figure_stands_beside_the_best_checkpoint_where_one_was_chosen():
    """Published scores are those of a chosen checkpoint: 21 of the best stands beside 24.5, not 20 of the last step."""
    chosen = {"selection/uses_labels": True, "selection/rule": "highest val/cluster/miou", "best/cluster/acc": 43.0}
    (section,) = comparison.arrange([finished(**chosen)])
    section.entries[0].published, section.entries[0].source = {"cluster/miou": 24.5}, "A, 2022"
    last, best = (
        part.split("\n\n")[1] for part in comparison_tables.markdown([section], "t").split("percent, mean")[1:]
    )
    assert "24.5" not in last
    assert "| 21.0 | cluster 24.5 mIoU (A, 2022) |" in best
    rows = list(csv.DictReader(StringIO(comparison_tables.as_csv([section]))))
    figures = {(row["stage"], row["metric"]): row["published"] for row in rows}
    assert figures[("best", "miou")] == "24.5"
    assert figures[("val", "miou")] == ""
    tex = comparison_tables.latex([section], "t")
    assert "scores of the best checkpoint in percent" in tex
    assert "$43.0$ & $21.0$" in tex
    page = drawn("charts", "bars", comparison_page.bars(section, "cluster"))
    assert "21.0" in page
    assert 'title="published: 24.5"' in page


def test_label_use_is_said():
    chosen = {"selection/uses_labels": True, "selection/rule": "highest"}
    runs = [
        finished(uses_labels=True),
        finished("hp", **chosen),
        replace(finished("x", **chosen), checkpoint=Path("best.ckpt")),
    ]
    (section,) = comparison.arrange(runs)
    used = {stage: [comparison_tables.labels_used(entry, stage) for entry in section.entries] for stage in STAGES}
    assert used == {"val": ["training", "none", "choice of best"], "best": ["training", *["choice of best"] * 2]}
    last, best = comparison_tables.markdown([section], "T").split("Scores of the best checkpoint")
    assert "| hp | tiny | 0 | 8 | 16 | none |" in last
    assert "| hp | tiny | 0 | 8 | 16 | choice of best |" in best


def test_curves_are_means_at_the_steps_that_all_runs_have(tmp_path):
    runs = []
    for seed, rows in enumerate(["step,val/cluster/miou\n2,10\n2,\n4,20\n", "step,val/cluster/miou\n2,20\n6,30\n"]):
        folder = tmp_path / str(seed)
        folder.mkdir()
        (folder / "metrics.csv").write_text(rows)
        runs.append(finished(seed=seed, folder=str(folder)))
    (section,) = comparison.arrange(runs)
    assert section.entries[0].curve("val/cluster/miou") == [(2, 15.0)]
    assert runs[0].history("val/cluster/miou") == [(2, 10.0), (4, 20.0)]


def test_a_folder_without_a_finished_run_is_named(tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    with pytest.raises(ConfigError) as error:
        Finished.read(tmp_path, dict, lambda path: {})
    assert str(error.value) == (
        f"runs: {tmp_path} holds no finished run (metrics.json is missing); finish it, or leave it out"
    )
    (tmp_path / "metrics.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"environment\.json is missing"):
        Finished.read(tmp_path, dict, lambda path: {})


def test_the_best_checkpoint_has_a_table_unless_it_is_the_last_step_by_rule():
    (section,) = comparison.arrange([finished()])
    assert section.columns("best") == []
    (section,) = comparison.arrange([finished(), finished("hp", **{"selection/rule": "highest val/cluster/miou"})])
    assert section.columns("best") == [("cluster", "miou")]


def test_bars_are_drawn_to_scale():
    html = drawn("charts", "bars", charts.bars([charts.Bar("a <b>", 20.0, 5.0, 40.0), charts.Bar("c", 10.0)]))
    assert 'data-top="40"' in html
    assert "width:50.00%" in html  # 20 of 40
    assert "left:37.50%;width:25.00%" in html  # 15 to 25
    assert 'left:100.00%" title="published: 40"' in html
    assert "a &lt;b&gt;" in html
    assert "20.0 ± 5.0" in html


@pytest.mark.parametrize(("low", "high"), [(0, 10), (0, 300), (20, 60), (0, 7), (0, 1)])
def test_axes_have_a_few_round_numbers(low, high):
    found = charts.ticks(low, high)
    assert found[0] == low
    assert found[-1] <= high
    assert 4 <= len(found) <= 8


def test_what_a_method_stands_on_is_in_its_name():
    """Runs on two trainings of one method are seeds of one row; on none, or on another, they are other rows."""
    begun = {"method.init_from": "a.ckpt", "method.base.name": "stego"}
    runs = [
        finished("primaps", 0, stands_on="stego", config=begun),
        finished("primaps", 1, stands_on="stego", config=begun | {"method.init_from": "b.ckpt"}),
        finished("primaps", 0, stands_on="hidden_positives", config={"method.base.name": "hidden_positives"}),
        finished("primaps", 0),
    ]
    (section,) = comparison.arrange(runs)
    assert [entry.label for entry in section.entries] == ["primaps on stego", "primaps on hidden_positives", "primaps"]
    assert section.entries[0].seeds == [0, 1]
    assert "| primaps on stego |" in comparison_tables.markdown([section], "x")
