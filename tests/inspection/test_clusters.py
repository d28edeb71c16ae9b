"""`clusters` and `predict` with names: files as a user finds and edits them, exact errors."""

import csv
import json
import re
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

import run
from inference import naming, predicting
from inference.overviews import Areas, present
from inspection import asked, cluster_count
from tests.support.browser import probed

pytestmark = pytest.mark.train


def call(*words: str) -> int:
    return run.main(list(words))


@pytest.fixture(scope="module")
def named(small_run, tmp_path_factory) -> Path:
    """A checkpoint of its own (so that no other test meets its names) with the files of `clusters`."""
    source = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    target = tmp_path_factory.mktemp("own") / "checkpoints" / "last.ckpt"
    target.parent.mkdir()
    target.write_bytes(source.read_bytes())
    assert call("clusters", f"ckpt={target}") == 0
    return target


@pytest.fixture
def folder(named) -> Path:
    return named.parent.parent / "clusters" / "last"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a", (40, 64)), ("sub/b", (48, 48))):
        path = root / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def test_clusters_writes_a_page_a_sheet_a_table_and_names(folder):
    table = rows(folder / "clusters.csv")
    assert [row["id"] for row in table] == [str(i) for i in range(12)]
    assert sum(float(row["share"]) for row in table) == pytest.approx(100, abs=0.02)
    assert all(str(i) not in row["nearest"].split() and len(row["nearest"].split()) == 3 for i, row in enumerate(table))
    page = (folder / "index.html").read_text()
    assert not re.search(r"(src|href)=\"?(http|//|file)", page)  # nothing is fetched
    assert page.count("data:image/jpeg") >= 12
    assert page.count('class="strip scenes"') == sum(float(row["share"]) > 0 for row in table)
    assert all(row["name"] in page for row in table)
    assert Image.open(folder / "clusters.png").height > 12 * 84
    assert len(re.findall(r"^  \d+: \{name: ", (folder / "names.yaml").read_text(), re.M)) == 12


EDITING = """
<script>
const typed = (place, name, colour) => {
  const inputs = document.querySelectorAll("#names label")[place].querySelectorAll("input");
  inputs[1].value = name;
  inputs[0].value = colour;
  inputs[1].dispatchEvent(new Event("input", {bubbles: true}));
};
addEventListener("load", async () => {
  const seen = {};
  URL.createObjectURL = blob => { seen.blob = blob; return "#"; };
  typed(3, "  wet \\"sand\\": no # <b>", "#102030");
  typed(5, "wet \\"sand\\": no # <b>", "#ffffff");
  document.querySelector("#names button").click();
  seen.yaml = await seen.blob.text();
  seen.heading = document.querySelector("#c3").textContent;
  document.querySelectorAll("#names label")[7].querySelectorAll("input")[1].value = " ";
  seen.blob = null;
  document.querySelector("#names button").click();
  document.title = JSON.stringify({...seen, refused: seen.blob === null});
});
</script>
"""


@pytest.mark.timeout(240)
def test_names_are_edited_in_a_browser(named, folder, tmp_path):
    seen = probed((folder / "index.html").read_text(), EDITING, tmp_path)
    assert seen["heading"] == 'wet "sand": no # <b>'
    assert seen["refused"]  # a cluster without a name
    (tmp_path / "names.yaml").write_text(seen["yaml"])
    content = naming.load(folder / "names.yaml")
    values = torch.load(named, weights_only=True)["state_dict"]["kmeans_probe.centroids"]
    found = naming.read(tmp_path / "names.yaml", content["probe"], values)
    before = naming.read(folder / "names.yaml", content["probe"], values)
    assert [found.names[i] for i in (3, 5)] == ['wet "sand": no # <b>'] * 2
    assert [found.colours[i] for i in (3, 5)] == [(16, 32, 48)] * 2
    kept = [i for i in range(12) if i not in (3, 5)]
    assert [(found.names[i], found.colours[i]) for i in kept] == [(before.names[i], before.colours[i]) for i in kept]


def test_edited_names_are_kept_and_used_by_predict(named, folder, pictures, tmp_path):
    path = folder / "names.yaml"
    text = path.read_text()
    edited = re.sub(r"^  3: .*$", '  3: {name: "wet, sand", colour: "#102030"}', text, flags=re.M)
    edited = re.sub(r"^  5: .*$", '  5: {name: "wet, sand", colour: "#ffffff"}', edited, flags=re.M)
    path.write_text(edited)
    assert call("clusters", f"ckpt={named}") == 0
    assert path.read_text() == edited
    assert "wet, sand" in (folder / "index.html").read_text()
    assert call("predict", f"ckpt={named}", f"input={pictures}", f"output={tmp_path}/o") == 0
    content = json.loads((tmp_path / "o" / "clusters.json").read_text())
    assert content["names_file"] == str(path)
    assert [content["clusters"][i]["name"] for i in (3, 5)] == ["wet, sand"] * 2
    assert [content["clusters"][i]["colour"] for i in (3, 5)] == [[16, 32, 48]] * 2  # one class, one colour
    areas = rows(tmp_path / "o" / "areas.csv")
    assert [row["picture"] for row in areas] == ["a.png", "sub/b.png"]
    for row in areas:
        ids = np.asarray(Image.open(tmp_path / "o" / "index" / row["picture"]))
        assert int(row["wet, sand"]) == np.isin(ids, (3, 5)).sum()
        assert float(row["wet, sand %"]) == pytest.approx(100 * np.isin(ids, (3, 5)).mean(), abs=0.005)
        counted = [
            int(value) for key, value in row.items() if key not in ("picture", "height", "width") and "%" not in key
        ]
        assert len(counted) == 11
        assert sum(counted) == ids.size == int(row["height"]) * int(row["width"])
        assert sum(float(value) for key, value in row.items() if "%" in key) == pytest.approx(100, abs=0.06)
    overview = Image.open(tmp_path / "o" / "overview.png").convert("RGB")
    assert overview.width > 900  # picture, segments, overlay
    page = (tmp_path / "o" / "overlays.html").read_text()
    assert not re.search(r"(src|href)=\"?(http|//|file)", page)
    assert "run.py clusters" not in page  # they have names
    cards = re.findall(r'<figure><a href="(.*?)"><img src="(.*?)".*?<figcaption>(.*?)</figcaption>(.*?)</figure>', page)
    assert [card[2] for card in cards] == [row["picture"] for row in areas]
    for row, (link, shown, _, legend) in zip(areas, cards, strict=True):
        assert link == shown == f"overlay/{row['picture']}"
        assert (tmp_path / "o" / link).is_file()
        total = int(row["height"]) * int(row["width"])
        large = {name: int(row[name]) for name in list(row)[3:14] if 100 * int(row[name]) >= total}
        names = re.findall(r"</span>(.*?) \((\d+) %\)</span>", legend)
        assert {name: int(share) for name, share in names} == {
            name: round(100 * count / total) for name, count in large.items()
        }
    assert call("predict", f"ckpt={named}", f"input={pictures}", f"output={tmp_path}/p", "names=none") == 0
    assert json.loads((tmp_path / "p" / "clusters.json").read_text())["names_file"] is None
    path.write_text(text)


def test_the_page_of_overlays_opens_pictures_of_any_name(named, tmp_path):
    (tmp_path / "in").mkdir()
    name = "50% #1 & <b>ä"
    Image.fromarray(np.zeros((48, 48, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{name}.png")
    assert call("predict", f"ckpt={named}", f"input={tmp_path}/in", f"output={tmp_path}/o", "names=none") == 0
    page = (tmp_path / "o" / "overlays.html").read_text()
    (link,) = re.findall('<img src="(.*?)"', page)
    assert (tmp_path / "o" / unquote(link)).is_file()
    assert not set(link) & set(" #<&")
    assert f"<code>run.py clusters ckpt={named}</code>" in page
    assert "<figcaption>50% #1 &amp; &lt;b&gt;ä.png</figcaption>" in page


def test_small_classes_are_counted_and_not_named():
    legend = naming.Legend(
        ["sky", "road", "sky", "car", "sea"], [(1, 1, 1), (2, 2, 2), (1, 1, 1), (3, 3, 3), (4, 4, 4)]
    )
    areas = Areas(legend)
    ids = np.repeat([0, 1, 2, 3], [300, 995, 700, 5]).reshape(40, 50)
    assert areas.add("x", "x.jpg", ids) == [1000, 995, 5, 0]
    assert present(legend, [1000, 995, 5, 0]) == ([((1, 1, 1), "sky (50 %)"), ((2, 2, 2), "road (50 %)")], 1)


def test_clusters_of_one_name_have_no_border_between_them(tmp_path):
    legend = naming.Legend(["sky", "road", "sky"], [(0, 0, 200), (200, 0, 0), (0, 0, 200)])
    ids = np.repeat([0, 2, 1], 8)[None].repeat(600, 0)  # more rows than are drawn at once
    predicting.write(tmp_path, "x", np.full((600, 24, 3), 128, np.uint8), ids, legend, 0.5)
    drawn = np.asarray(Image.open(tmp_path / "overlay" / "x.png")).astype(int)
    assert (drawn[:, :16] == drawn[0, 0]).all()
    assert (drawn[:, 16] != drawn[:, 17]).any(-1).all()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "index" / "x.png")), ids)  # they stay apart here


def error(capsys, *words: str) -> str:
    assert call(*words) == 2
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")][-1][len("error: ") :]


def test_names_that_do_not_fit_end_in_one_line(capsys, named, folder, pictures, tmp_path):
    words = ("predict", f"ckpt={named}", f"input={pictures}", f"output={tmp_path}/o")
    text, path = (folder / "names.yaml").read_text(), tmp_path / "names.yaml"
    assert error(capsys, *words, f"names={path}") == (
        f"names={path}: no such file; `run.py clusters ckpt=…` writes one to edit, names=none: without"
    )
    own = re.search('centroids: "(.*)"', text).group(1)
    path.write_text(text.replace(own, "abc"))
    assert error(capsys, *words, f"names={path}") == (
        f"names={path}: names the clusters abc of probe kmeans, this checkpoint has {own} of probe kmeans; let "
        "`run.py clusters` write a new file, or set names=none"
    )
    path.write_text(text.replace("{name: ", "{nam: ", 1))
    assert error(capsys, *words, f"names={path}").startswith(
        f'names={path}: cluster 0: expected {{name: sky, colour: "#3478be"}}, got {{'
    )
    path.write_text(re.sub('colour: "#.{6}"', 'colour: "blue"', text, count=1))
    assert error(capsys, *words, f"names={path}") == (
        f'names={path}: cluster 0: colour=blue: expected six hexadecimal digits in quotes, as in "#3478be"'
    )
    path.write_text(re.sub(r"^  11: .*\n", "", text, flags=re.M))
    assert error(capsys, *words, f"names={path}") == (
        f"names={path}: clusters: must hold an entry for each id from 0 to 11"
    )
    path.write_text("probe: [")
    assert error(capsys, *words, f"names={path}") == (
        f"names={path}: cannot be read as yaml (line 1); put names that hold : or # in quotes"
    )
    path.write_text("{}")
    assert error(capsys, *words, f"names={path}") == (
        f"names={path}: must hold the keys probe, centroids, clusters; let `run.py clusters` write it anew"
    )


def test_names_of_other_clusters_are_put_aside(named, folder):
    path = folder / "names.yaml"
    text = path.read_text()
    other = re.sub("centroids: .*", "centroids: 0123456789ab", text)
    path.write_text(other)
    assert call("clusters", f"ckpt={named}") == 0
    assert path.read_text() == text
    assert (folder / "names.0123456789ab.yaml").read_text() == other


def test_a_sweep_writes_a_row_for_each_number_of_clusters(capsys, named, folder):
    assert call("clusters", f"ckpt={named}", "sweep=3..5", "evaluation.kmeans.restarts=1") == 0
    table = rows(folder / "sweep.csv")
    assert [row["clusters"] for row in table] == ["3", "4", "5"]
    assert [float(row["cosine"]) for row in table] == sorted(float(row["cosine"]) for row in table)
    assert all(-1 <= float(row["silhouette"]) <= 1 for row in table)
    assert Image.open(folder / "sweep.png").width > 900
    assert Image.open(folder / "sweep_pictures.png").width > 4 * 230  # the picture, and three numbers of clusters
    assert error(capsys, "clusters", f"ckpt={named}", "sweep=9..3") == (
        "sweep=9..3: expected a range of numbers of clusters from 2 on, as in sweep=6..40"
    )
    assert error(capsys, "clusters", f"ckpt={named}", "sweep=2..999") == (
        "sweep=2..999: 792 codes of training pictures are too few for 982 clusters in each half of them; lower it, or "
        "raise evaluation.kmeans.pictures"
    )


def test_a_number_of_a_sweep_is_taken_without_training(capsys, named, pictures, tmp_path):
    assert call("clusters", f"ckpt={named}", "k=5") == 0
    taken = named.with_name("last.k5.ckpt")
    before, after = (torch.load(path, weights_only=True) for path in (named, taken))
    assert after["state_dict"]["kmeans_probe.centroids"].shape[0] == 5
    same = [key for key in before["state_dict"] if not key.startswith("kmeans_probe.")]
    assert all(torch.equal(before["state_dict"][key], after["state_dict"][key]) for key in same)
    folder = named.parent.parent / "clusters" / "last.k5"
    assert len(rows(folder / "clusters.csv")) == 5
    assert (folder / "names.yaml").read_text().count("{name: ") == 5
    cfg, data, model, _ = cluster_count.restore(named, [])
    points, _ = cluster_count.codes(cfg, data, model)
    swept = cluster_count.fit(cfg, points, 5).centroids
    assert torch.equal(after["state_dict"]["kmeans_probe.centroids"], swept)
    assert call("predict", f"ckpt={taken}", f"input={pictures}", f"output={tmp_path}/o") == 0
    assert len(json.loads((tmp_path / "o" / "clusters.json").read_text())["clusters"]) == 5
    assert call("eval", f"ckpt={taken}") == 0
    metrics = json.loads((named.parent.parent / "eval" / "last.k5" / "metrics.json").read_text())
    assert metrics["protocol/kmeans_clusters"] == 5
    assert call("eval", f"ckpt={named}") == 0
    old = json.loads((named.parent.parent / "eval" / "last" / "metrics.json").read_text())
    assert metrics["val/cluster/miou"] == old["val/cluster/miou"]
    assert metrics["val/kmeans/miou"] != old["val/kmeans/miou"]
    capsys.readouterr()
    assert (
        error(capsys, "clusters", f"ckpt={named}", "k=²")
        == "k=²: expected a whole number, the number of clusters to take"
    )
    assert error(capsys, "clusters", f"ckpt={named}", "k=5", "sweep=2..5") == (
        "k=5: sweep=2..5 tries numbers of clusters, k takes one; give one of the two"
    )
    assert error(capsys, "clusters", f"ckpt={named}", "k=99999") == (
        "k=99999: expected a number of clusters from 1 to 792, the codes that are clustered"
    )


def test_clusters_keep_their_colour_from_one_number_to_the_next(tmp_path, monkeypatch):
    centroids = torch.eye(4)
    codes = torch.eye(4).reshape(4, 2, 2)
    seen = cluster_count.Seen("a", torch.zeros(3, 2, 2), codes, (2, 2))
    drawn = {}
    monkeypatch.setattr(cluster_count.panels, "save", lambda path, rows, *_, **__: drawn.update(rows[0].maps))
    cluster_count.side_by_side(tmp_path / "x.png", [seen], {3: centroids[[2, 0, 1]], 4: centroids})
    few, many = drawn["K = 3"].ravel(), drawn["K = 4"].ravel()
    assert many[:3].tolist() == few[:3].tolist()
    assert many[3] == 3


def test_a_long_range_is_tried_at_even_steps():
    found = asked.numbers("6..80")
    assert (found[0], found[-1], len(found)) == (6, 78, 25)
    assert asked.numbers("6..40") == list(range(6, 41))


@pytest.mark.parametrize("mark", ["123456789012", "012345670123", "1234567890e1"])
def test_a_mark_that_looks_like_a_number_stays_a_text(tmp_path, mark, monkeypatch):
    monkeypatch.setattr(naming, "mark", lambda values: mark)
    legend = naming.Legend(["a", "b"], [(1, 1, 1), (2, 2, 2)])
    naming.write(tmp_path / "names.yaml", legend, "cluster", torch.zeros(2, 3))
    assert naming.read(tmp_path / "names.yaml", "cluster", torch.zeros(2, 3)).names == ["a", "b"]


def test_names_hold_whatever_people_write(tmp_path):
    names = ['a "quoted" name', "sky: blue", "# not a comment", "grün", "no"]
    legend = naming.Legend(names, [(i, i, i) for i in range(5)])
    values = torch.randn(5, 3)
    naming.write(tmp_path / "names.yaml", legend, "cluster", values)
    found = naming.read(tmp_path / "names.yaml", "cluster", values)
    assert (found.names, found.colours) == (names, legend.colours)
