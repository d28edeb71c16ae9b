"""`run.py compare`: what is trained and what is taken, the report, and its page in a real browser."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest

import config
import run
from engine.records import recipes
from launch import compare, trials
from tests.conftest import small_words
from tests.support.browser import probed

PROBE = """
<script>
addEventListener("load", () => {
  const table = document.getElementById("val1"), heads = [...table.tHead.rows[0].cells];
  const column = heads.findIndex(head => head.textContent.trim() === "kmeans mIoU");
  const order = () => [...table.tBodies[0].rows].map(row => row.cells[column].dataset.value);
  heads[column].click(); const down = order(); heads[column].click();
  const images = [...document.images];
  document.title = JSON.stringify({down, up: order(), sorted: heads[column].getAttribute("aria-sort"),
    images: images.length, broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    window: innerWidth, wide: document.documentElement.scrollWidth, bars: document.querySelectorAll(".track").length,
    curves: document.querySelectorAll("svg polyline").length,
    hidden: table.scrollWidth - table.parentElement.clientWidth, score: heads[2].getBoundingClientRect().right,
    smallest: Math.min(...[...document.querySelectorAll("td")]
      .map(cell => parseFloat(getComputedStyle(cell).fontSize)))});
});
</script>
"""
"""Added to a copy of the page: clicks a head twice and puts what it sees into the title."""


def words_of(method: str, parent: Path, *more: str) -> list[str]:
    own = [word for word in small_words(method) if not word.startswith(("method=", "method."))]
    return [*own, f"run.dir={parent}", *more]


@pytest.fixture
def given(small_run, tmp_path) -> list[Path]:
    """Three finished runs: two methods, and one of them under another protocol."""
    folders = []
    for name in ("kmeans_baseline", "hidden_positives"):
        shutil.copytree(small_run(name).folder, tmp_path / name)
        folders.append(tmp_path / name)
    shutil.copytree(folders[0], tmp_path / "flipped")
    metrics = json.loads((folders[0] / "metrics.json").read_text()) | {"protocol/flip": True}
    (tmp_path / "flipped" / "metrics.json").write_text(json.dumps(metrics))
    return [*folders, tmp_path / "flipped"]


@pytest.mark.train
def test_given_runs_become_a_report(given, tmp_path, capsys):
    assert run.main(["compare", f"runs={' '.join(map(str, given))}", f"run.dir={tmp_path}", "name=x"]) == 0
    names = {path.name for path in (tmp_path / "compare" / "x").iterdir()}
    assert names == {"index.html", "table.md", "table.tex", "table.csv"}
    assert (tmp_path / "compare" / "x" / "table.md").read_text() in capsys.readouterr().out


def report(given: list[Path], folder: Path) -> str:
    """The page of these runs."""
    compare.report(folder, "Comparison", [compare.read_run(path) for path in given], [])
    return (folder / "index.html").read_text()


@pytest.mark.train
def test_the_report_names_differences_and_needs_no_network(given, tmp_path):
    page = report(given, tmp_path / "report")
    assert "flip: False -&gt; True" in page
    assert "<b>2 protocols.</b>" in page
    assert not re.search(r"""(src|href)=["']?(http|//|file)|@import|url\(""", page)
    assert page.count("<img ") == 4 * 4 + 4 * 3  # picture, truth, and the methods of each part
    assert "No pictures of" not in page
    assert "kmeans_baseline: kmeans, seed 0</span>" in page
    assert "hidden_positives: cluster, seed 0</span>" in page
    text = (tmp_path / "report" / "table.md").read_text()
    assert "**not comparable with protocol 1**: flip: False -> True" in text
    assert (tmp_path / "report" / "table.tex").read_text().count("\\begin{table}") == 2
    metrics = json.loads((given[0] / "metrics.json").read_text())
    assert f"| {metrics['val/kmeans/miou']:.1f} |" in text


@pytest.mark.train
def test_a_run_without_its_checkpoint_is_compared_and_its_pictures_are_missed(given, tmp_path):
    (given[1] / "checkpoints" / "last.ckpt").unlink()
    page = report(given[:2], tmp_path / "report")
    assert "No pictures of hidden_positives: ckpt=" in page
    assert page.count("<img ") == 4 * 3


@pytest.mark.train
@pytest.mark.timeout(240)
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(given, tmp_path, width):
    seen = probed(report(given, tmp_path / "report"), PROBE, tmp_path, width)
    values = [float(value) for value in seen["down"]]
    assert values == sorted(values, reverse=True)
    assert len(values) == 2
    assert seen["up"] == seen["down"][::-1]
    assert seen["sorted"] == "ascending"
    assert (seen["images"], seen["broken"]) == (28, 0)
    assert seen["wide"] <= seen["window"]  # tables scroll by themselves, the page does not
    assert seen["score"] <= seen["window"]  # scores are seen without scrolling
    assert width < 1200 or seen["hidden"] <= 0  # and on a wide screen the whole table
    assert seen["bars"] == 9
    assert seen["curves"] > 0
    assert seen["smallest"] >= 12


STAND_IN = """
import json, pathlib, shutil, sys
words = dict(word.split("=", 1) for word in sys.argv[2:])
if words["seed"] == "13":
    sys.exit("error: an unlucky number")
folder = pathlib.Path(words["run.dir"]) / words["run.name"]
shutil.copytree({source!r}, folder)
metrics = json.loads((folder / "metrics.json").read_text())
(folder / "metrics.json").write_text(json.dumps(dict(metrics, seed=int(words["seed"]))))
(folder / "words").write_text(json.dumps(words))
"""
"""In place of run.py: a finished run, copied; the unlucky seed fails."""


@pytest.fixture
def stand_in(small_run, tmp_path, monkeypatch) -> Path:
    (tmp_path / "run.py").write_text(STAND_IN.format(source=str(small_run("kmeans_baseline").folder)))
    monkeypatch.setattr(trials, "ROOT", tmp_path)
    return tmp_path


@pytest.mark.train
def test_what_is_missing_is_trained_what_is_there_is_taken_and_failures_are_named(
    stand_in, capsys, monkeypatch, small_run
):
    parent = stand_in / "runs"
    shutil.copytree(small_run("kmeans_baseline").folder, parent / "by-hand")
    words = ["compare", "methods=kmeans_baseline", "name=n", *words_of("kmeans_baseline", parent)]
    assert run.main([*words, "seeds=0"]) == 0  # the configuration of the run that lies there
    assert sorted(path.name for path in parent.iterdir()) == ["by-hand", "compare"]
    with pytest.raises(SystemExit) as stopped:
        run.main([*words, "seeds=0 13 2", "kmeans_baseline:method.features=backbone"])
    assert stopped.value.code == 1
    out = capsys.readouterr().out
    assert "failed: error: an unlucky number" in out
    names = sorted(path.name for path in parent.iterdir() if path.is_dir())
    assert [name.rpartition("-")[2] for name in names] == ["hand", "compare", "seed2"]
    page = (parent / "compare" / "n" / "index.html").read_text()
    assert "<b>Missing:</b> kmeans_baseline, seed 13: error: an unlucky number" in page
    handed = json.loads((parent / names[-1] / "words").read_text())
    assert (handed["method"], handed["method.features"]) == ("kmeans_baseline", "backbone")


@pytest.mark.train
def test_a_given_run_is_not_trained_again_and_a_copy_of_it_is_counted_once(stand_in, small_run, caplog):
    given, parent = stand_in / "elsewhere", stand_in / "runs"
    for folder in (given / "mine", parent / "copy"):
        shutil.copytree(small_run("kmeans_baseline").folder, folder)
    words = ["compare", f"runs={given}/mine {parent}/copy", "methods=kmeans_baseline", "seeds=0 1", "name=n"]
    assert run.main([*words, *words_of("kmeans_baseline", parent)]) == 0
    assert [path.name for path in parent.iterdir() if "seed0" in path.name] == []
    with (parent / "compare" / "n" / "table.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if (row["stage"], row["metric"]) == ("val", "miou")]
    assert [(row["seeds"], row["runs"]) for row in rows if row["probe"] == "kmeans"] == [("0 1", "2")]
    line = f"{parent}/copy is left out: kmeans_baseline, seed 0 in the configuration of {given}/mine"
    assert line in caplog.text
    assert f"<b>Counted once:</b> {line}" in (parent / "compare" / "n" / "index.html").read_text()


@pytest.mark.train
def test_shares_of_a_job_array_make_one_report(stand_in, capsys):
    words = [
        "compare",
        "methods=kmeans_baseline",
        "seeds=4 5",
        "name=n",
        *words_of("kmeans_baseline", stand_in / "runs"),
    ]
    assert run.main([*words, "part=0/2"]) == 0
    assert "1 trainings are not finished yet" in capsys.readouterr().out
    assert not (stand_in / "runs" / "compare" / "n" / "index.html").exists()
    assert run.main([*words, "part=1/2"]) == 0
    assert "| kmeans_baseline | tiny | 4 5 |" in (stand_in / "runs" / "compare" / "n" / "table.md").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], 'compare: name methods="a b" to train, or runs="runs/a runs/b" that are finished'),
        (["runs=x", "seeds=1"], 'seeds=1: is for runs that are trained here; name methods="a b" too'),
        (["methods=stego", "seed=1"], 'seed=1: follows from methods="…" and seeds="…"; leave it out'),
        (["methods=stego", "hp:method.dim=3"], "hp:method.dim=3: hp is none of methods=stego"),
        (["methods=stego", "seeds=a"], "seeds=a: expected a whole number of at least 0"),
        (["methods=stegoo"], "method=stegoo: no such method; did you mean stego?"),
        (["methods=stego", "name=a/b"], "name=a/b: expected a plain folder name"),
    ],
)
def test_wrong_words_end_in_one_line(capsys, monkeypatch, tmp_path, words, line):
    monkeypatch.chdir(tmp_path)
    assert run.main(["compare", *words]) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_recipe_is_recognised_by_all_that_matters():
    name = "stego_cocostuff27_vitb8"
    cfg = config.compose(
        [f"experiment={name}", "seed=7", "data.root=/data", "trainer.devices=4", "evaluation.panels=9"]
    )
    flat = config.flatten(cfg) | {"method.num_clusters": 27}
    assert recipes.published_recipe(flat) == name
    assert recipes.figures(name)[0]["cluster_crf/miou"] == 28.2
    assert recipes.published_recipe(flat | {"evaluation.overcluster.k": [500], "evaluation.cbfe.clusters": 9}) == name
    assert recipes.published_recipe(flat | {"optim.head.lr": 1.0}) is None
    assert recipes.published_recipe(config.flatten(config.compose(["method=stego"]))) is None


def test_the_word_for_one_method_wins_wherever_it_stands(tmp_path):
    words = ["methods=hidden_positives kmeans_baseline", "hidden_positives:data.batch_size=4", "data.batch_size=16"]
    found = compare.Comparison(config.parse_words([*words, f"run.dir={tmp_path}"])).trials
    assert ["data.batch_size=4" in found[0].words, "data.batch_size=16" in found[1].words] == [True, True]


def test_folders_are_named_after_the_whole_configuration(tmp_path, monkeypatch):
    """A default that changes in a yaml is another training."""

    def names() -> list[str]:
        words = config.parse_words(["methods=kmeans_baseline", "seeds=0 1", f"run.dir={tmp_path}"])
        return [trial.folder.name for trial in compare.Comparison(words).trials]

    before, compose = names(), config.compose
    assert before == names()
    assert before[0].removesuffix("-seed0") == before[1].removesuffix("-seed1")
    monkeypatch.setattr(config, "compose", lambda words: config.changed(compose(words), {"data.flip_p": 0.25}))
    assert not set(before) & set(names())


@pytest.mark.train
def test_a_run_with_other_clusters_than_asked_for_is_not_taken(small_run, tmp_path):
    shutil.copytree(small_run("kmeans_baseline").folder, tmp_path / "a")
    words = [*words_of("kmeans_baseline", tmp_path), "methods=kmeans_baseline"]

    def folder(*more: str) -> str:
        return compare.Comparison(config.parse_words([*words, *more])).trials[0].folder.name

    assert folder() == "a"
    assert folder("method.num_clusters=12") == "a"
    stored = (tmp_path / "a" / "config.yaml").read_text()
    assert "num_clusters: 12" in stored
    (tmp_path / "a" / "config.yaml").write_text(stored.replace("num_clusters: 12", "num_clusters: 40"))
    assert folder() != "a"
    assert folder("method.num_clusters=40") == "a"
