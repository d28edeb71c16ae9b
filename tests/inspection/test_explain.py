"""`run.py explain`: the page and its figures as a user finds them, numbers against plain formulas, exact errors."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import run
from inspection import clusters, explaining, explanation
from lightning_modules.base.relations import Seen, cell
from reporting import embedding, figures
from reporting.figures import Spot
from reporting.page import inlined
from tests.conftest import Run, run_small
from tests.support.browser import probed

FIGURES = ["attention.png", "embedding.png", "labels.png", "similarity.png"]
OF_HP = ["neighbourhood.png", "positives_agnostic.png", "positives_specific.png"]


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A picture that is wider than high; at 48 px it is 48 x 108, and padded to 112 for patches of 8."""
    path = tmp_path_factory.mktemp("picture") / "wide one.png"
    pixels = np.random.default_rng(0).integers(0, 255, (5, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((90, 40)).save(path)
    return path


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory) -> Run:
    """Hidden Positives on a network without attention, without dropout."""
    words = ["backbone=mobilenetv2_coral", "backbone.weights=none", "method.dropout.p=0", "trainer.max_steps=2"]
    return run_small("hidden_positives", tmp_path_factory.mktemp("cnn"), "cnn", *words, "trainer.val_every=100")


def call(found: Run, picture: Path, *words: str, point: str = "70,10") -> int:
    checkpoint = found.folder / "checkpoints" / "last.ckpt"
    return run.main(["explain", f"ckpt={checkpoint}", f"image={picture}", f"point={point}", *words])


@pytest.fixture(scope="module")
def written(small_run, picture, tmp_path_factory) -> Callable[[str], Path]:
    """The folder that the command writes for a method's small run."""
    done: dict[str, Path] = {}

    def get(method: str) -> Path:
        if method not in done:
            done[method] = tmp_path_factory.mktemp("explained") / "out"
            words = ["explain.pictures=3", "explain.clusters=12"]
            assert call(small_run(method), picture, f"output={done[method]}", *words) == 0
        return done[method]

    return get


def images(page: str) -> int:
    return page.count("<img ")


def test_the_ink_of_figures_is_read_on_the_light_and_on_the_dark_page():
    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return float(np.dot([0.2126, 0.7152, 0.0722], linear)) + 0.05  # WCAG's relative luminance

    papers = re.findall("--paper: (#[0-9a-f]+)", inlined("style.css"))
    assert len(papers) == 2
    for paper in ("#ffffff" if own == "#fff" else own for own in papers):
        values = sorted([light(paper), light(figures.INK)])
        assert values[1] / values[0] > 4, paper


@pytest.mark.train
@pytest.mark.parametrize(
    ("method", "expected"), [("hidden_positives", FIGURES + OF_HP), ("kmeans_baseline", FIGURES)], ids=str
)
def test_a_page_with_its_figures_that_needs_no_network(method, expected, written):
    folder = written(method)
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    assert names == sorted([*expected, "explain.json", "index.html"])
    for name in expected:
        with Image.open(folder / name) as figure:
            assert np.asarray(figure.convert("L")).std() > 10, name
            assert figure.getpixel((0, 0))[3] == 0, f"{name} has a paper of its own, a white box on a dark page"
    page = (folder / "index.html").read_text()
    assert not re.search(r"""(src|href)=["']?(http|//|file)|@import|url\(""", page)
    assert images(page) == len(expected)
    assert "Compared with 3 training pictures" in page
    assert ("hidden positives" in page) == (method == "hidden_positives")


@pytest.mark.train
def test_a_network_without_attention_says_so_and_takes_the_affinity(convolutional, picture, tmp_path):
    assert call(convolutional, picture, f"output={tmp_path}", "explain.pictures=2", "explain.embedding=pca") == 0
    page = (tmp_path / "index.html").read_text()
    assert "Left out: the backbone mobilenetv2_coral (mobilenetv2_100) has no attention layers." in page
    assert "from the affinity of the features" in page
    assert images(page) == 6
    assert not (tmp_path / "attention.png").exists()


@pytest.mark.train
def test_numbers_are_those_of_the_patch_under_the_point(small_run, picture, written):
    content, patch = json.loads((written("hidden_positives") / "explain.json").read_text()), [1, 10]
    assert (content["patch"], content["grid"]) == (patch, [6, 14])
    _, _, model, _ = clusters.restore(small_run("hidden_positives").folder / "checkpoints" / "last.ckpt", [])
    image = torch.zeros(1, 3, 48, 112)
    resized = Image.open(picture).resize((108, 48), Image.Resampling.BILINEAR)
    image[0, :, :, :108] = torch.from_numpy(np.asarray(resized) / 255).permute(2, 0, 1)
    with torch.inference_mode():
        code = model.embed(model.features(image))[0, :, patch[0], patch[1]]
    cosines = F.cosine_similarity(code, model.kmeans_probe.centroids, dim=1)
    order = cosines.argsort(descending=True).tolist()
    assert [item["id"] for item in content["clusters"]] == order
    assert [item["cosine"] for item in content["clusters"]] == pytest.approx(cosines[order].tolist(), abs=1e-3)
    assert [item["probability"] for item in content["clusters"]] == pytest.approx(
        (2 * cosines).softmax(0)[order].tolist(), abs=1e-3
    )
    assert content["confidence"] == content["clusters"][0]["cosine"]
    assert content["lead"] == pytest.approx(content["confidence"] - content["clusters"][1]["cosine"])


@pytest.mark.train
@pytest.mark.parametrize(("point", "patch"), [("0,0", [0, 0]), ("89,39", [5, 13])])
def test_corners_of_the_picture_and_no_others(small_run, picture, tmp_path, point, patch):
    """The last column of patches is half padding, and no picture is compared."""
    assert call(small_run("hidden_positives"), picture, f"output={tmp_path}", "explain.pictures=0", point=point) == 0
    assert json.loads((tmp_path / "explain.json").read_text())["patch"] == patch
    page = (tmp_path / "index.html").read_text()
    assert "Compared with" not in page
    assert "of 84 patches" in page


@pytest.mark.train
def test_names_of_the_clusters_are_used_and_the_folder_lies_in_the_run(small_run, picture, tmp_path):
    source = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    own = Run(tmp_path, {})
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(source, tmp_path / "checkpoints" / "last.ckpt")
    assert run.main(["clusters", f"ckpt={tmp_path}/checkpoints/last.ckpt"]) == 0
    names = tmp_path / "clusters" / "last" / "names.yaml"
    names.write_text(re.sub(r'name: "[^"]*"', 'name: "moss & <b>"', names.read_text()))
    assert call(own, picture, "explain.pictures=1") == 0
    page = (tmp_path / "explain" / "last" / "wide one-70-10" / "index.html").read_text()
    assert "moss &amp; &lt;b&gt;" in page
    assert call(own, picture, "explain.pictures=1", "names=none") == 0
    assert "moss" not in (tmp_path / "explain" / "last" / "wide one-70-10" / "index.html").read_text()


def unit(rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows.double(), dim=1)


@pytest.mark.train
def test_positives_follow_the_rule_of_the_loss_among_pictures_of_several_sizes(convolutional):
    """Against A_ij = <f_i,f_j> > c_i or > c_j, with c the highest product with the pool, one pair after another."""
    _, _, model, _ = clusters.restore(convolutional.folder / "checkpoints" / "last.ckpt", [])
    generator, seen = torch.Generator().manual_seed(0), []
    for size in ((48, 80), (64, 40)):
        features = model.backbone.features(torch.rand(1, 3, *size, generator=generator))
        seen.append(Seen("x", torch.zeros(3, *size), size, features, model.embed(features)))
    place = (0.6, 0.3)
    row, column = cell(place, tuple(seen[0].features.concat().shape[-2:]))
    rows = [item.features.concat()[0].flatten(1).T for item in seen]
    anchor = row * seen[0].features.concat().shape[-1] + column
    spaces = {
        "positives_agnostic": (torch.cat(rows), model.pool.agnostic_rows()),
        "positives_specific": (model.momentum_head(torch.cat(rows)), model.pool.specific_rows()),
    }
    found = {item.name: item for item in model.relations(seen, place)}
    assert list(found) == [*spaces, "neighbourhood"]
    for name, (vectors, pool) in spaces.items():
        vectors, pool = unit(vectors), pool.double()
        limits = [float((pool @ vector).max()) for vector in vectors]
        expected = [
            j != anchor and float(vectors[anchor] @ vectors[j]) > min(limits[anchor], limits[j])
            for j in range(len(vectors))
        ]
        drawn = torch.cat([own.flatten() for own in found[name].maps]).tolist()
        assert [own.shape for own in found[name].maps] == [item.features.concat().shape[-2:] for item in seen]
        assert drawn == expected
        assert 0 < sum(drawn) < len(drawn) - 1
        assert f": {sum(drawn)} of {len(drawn)} patches" in found[name].rule
    weights = found["neighbourhood"].maps[0]
    assert weights.isfinite().sum() == 9
    assert weights[row - 1 : row + 2, column - 1 : column + 2].isfinite().all()
    corner = {item.name: item for item in model.relations(seen, (0.0, 0.0))}["neighbourhood"]
    assert corner.maps[0].isfinite().sum() == 4
    assert "divided by 4" in corner.rule


@pytest.mark.train
def test_empty_pools_are_said_and_not_guessed(convolutional, picture):
    _, _, model, _ = clusters.restore(convolutional.folder / "checkpoints" / "last.ckpt", [])
    model.pool.agnostic_filled.zero_()
    features = model.backbone.features(torch.rand(1, 3, 48, 48))
    first, *_ = model.relations([Seen("x", torch.zeros(3, 48, 48), (48, 48), features, None)], (0.5, 0.5))
    assert (first.title, list(first.maps)) == ("Hidden positives", [])
    assert first.rule.startswith("The pools of this checkpoint are empty")


@pytest.mark.train
def test_the_picture_itself_is_not_among_the_others(small_run, tmp_path):
    cfg, data, model, _ = clusters.restore(
        small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt", ["explain.pictures=22"]
    )
    image, _ = data.source("train").read(5)
    Image.fromarray(image).save(tmp_path / "own.png")
    views = list(explaining.look(cfg, data, model, explaining.one_picture(tmp_path / "own.png"), "kmeans"))
    assert len(views) == 22  # itself and the 21 others of 22
    assert data.source("train").id(5) not in [view.seen.name for view in views]
    again = list(explaining.look(cfg, data, model, explaining.one_picture(tmp_path / "own.png"), "kmeans"))
    assert [view.seen.name for view in again] == [view.seen.name for view in views]


@pytest.mark.train
def test_windows_of_the_evaluation_are_kept(small_run, picture):
    checkpoint = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    words = ["evaluation.window.size=32", "explain.pictures=0"]
    cfg, data, model, _ = clusters.restore(checkpoint, words)
    (view,) = explaining.look(cfg, data, model, explaining.one_picture(picture), "kmeans")
    with torch.inference_mode():
        codes, scores = model.read(view.seen.image[None])
    assert torch.equal(view.scores, scores["kmeans"])
    assert torch.equal(view.seen.codes, codes)
    assert not torch.allclose(codes, model.embed(view.seen.features), atol=1e-3)


@pytest.mark.train
@pytest.mark.parametrize(
    ("point", "line"),
    [
        ("12", "point=12: expected x,y, two whole numbers of pixels from the top left, as in point=120,80"),
        ("1.5,2", "point=1.5,2: expected x,y, two whole numbers of pixels from the top left, as in point=120,80"),
        ("90,0", "point=90,0: lies outside wide one.png (90 x 40 px); x must be 0 to 89, y 0 to 39"),
        ("3,-1", "point=3,-1: lies outside wide one.png (90 x 40 px); x must be 0 to 89, y 0 to 39"),
    ],
)
def test_points_that_are_refused(small_run, picture, capsys, point, line):
    assert call(small_run("kmeans_baseline"), picture, point=point) == 2
    assert capsys.readouterr().err == f"error: {line}\n"


@pytest.mark.train
def test_pictures_and_settings_that_are_refused(small_run, picture, tmp_path, capsys, monkeypatch):
    found, broken = small_run("kmeans_baseline"), tmp_path / "broken.jpg"

    def error(*words: str, of: Path = picture) -> str:
        assert call(found, of, *words) == 2
        return capsys.readouterr().err.splitlines()[-1]

    broken.write_text("no picture")
    assert error(of=broken) == (
        f"error: {broken}: this file cannot be read as a picture (empty, or not a kind of picture that is known)"
    )
    assert error(of=tmp_path / "a.png") == f"error: image={tmp_path}/a.png: no such file; name one picture"
    assert error("explain.points=0") == "error: explain.points=0: must be at least 1"
    monkeypatch.setitem(sys.modules, "umap", None)
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    assert error("explain.embedding=umap") == (
        "error: explain.embedding=umap: the package umap-learn is not installed; install it, or set "
        "explain.embedding=pca"
    )


def test_attention_is_one_row_of_the_softmax():
    logits = torch.randn(2, 1 + 12, 1 + 12, generator=torch.Generator().manual_seed(0))
    shares = explanation.attention_row(logits, 1, (0.5, 0.9), (3, 4))
    assert shares.shape == (2, 3, 4)
    row = logits[1].softmax(1)[1 + 1 * 4 + 3]
    assert torch.allclose(shares[1].flatten(), row[1:])
    assert torch.allclose(shares.sum((1, 2)) + logits.softmax(2)[:, 8, 0], torch.ones(2))


def test_similarity_is_the_cosine_to_the_patch():
    maps = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(1))
    cosines = explanation.similarity(maps, (0.99, 0.0))
    assert cosines[2, 0] == pytest.approx(1)
    assert float(cosines[1, 3]) == pytest.approx(float(F.cosine_similarity(maps[:, 2, 0], maps[:, 1, 3], dim=0)))


def test_a_spot_frames_its_patch():
    assert Spot((17.0, 9.5), (48, 112)).box((6, 14)) == (16, 8, 8, 8)
    assert Spot((0.0, 0.0), (48, 112)).box((6, 14)) == (0, 0, 8, 8)


def test_principal_components_are_those_of_the_singular_vectors():
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(2)) * torch.tensor([5.0, 3, 1, 1, 1, 1])
    points, shares = embedding.principal(rows)
    left, values, _ = np.linalg.svd((rows - rows.mean(0)).double().numpy(), full_matrices=False)
    assert np.allclose(np.abs(points.numpy()), np.abs((left * values)[:, :2]), atol=1e-6)
    assert shares == pytest.approx((values**2 / (values**2).sum())[:2].tolist())
    flat, shares = embedding.principal(torch.tensor([[1.0], [3.0]]))
    assert flat.tolist() == [[-1, 0], [1, 0]]
    assert shares == [1, 0]


def test_umap_is_taken_where_it_is_installed(monkeypatch):
    """A stand-in for the package: what it is asked for, and that its points are used."""
    asked = {}

    class UMAP:
        def __init__(self, **settings):
            asked.update(settings)

        def fit_transform(self, rows):
            return rows[:, :2] * 2

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=UMAP, __spec__=object()))
    assert embedding.choose("auto") == "umap"
    points, axes = embedding.embed(torch.eye(3), "umap", 5)
    assert points.tolist() == [[2, 0], [0, 2], [0, 0]]
    assert axes == ("UMAP 1", "UMAP 2")
    assert asked["metric"] == "cosine"
    assert asked["n_components"] == 2
    seed = asked["random_state"]
    embedding.embed(torch.eye(3), "umap", 6)
    assert asked["random_state"] != seed  # keyed by the seed of the run
    assert embedding.choose("pca") == "pca"


PROBE = """
<script>
addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({images: images.length, window: innerWidth,
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    wide: document.documentElement.scrollWidth, rows: document.querySelectorAll("#clusters tbody tr").length,
    legible: Math.min(...images.map(image => image.clientWidth / Math.min(640, image.naturalWidth)))});
});
</script>
"""


@pytest.mark.train
@pytest.mark.timeout(240)
@pytest.mark.parametrize("width", [1200, 400])
def test_the_page_in_a_browser(written, tmp_path, width):
    page = (written("hidden_positives") / "index.html").read_text()
    seen = probed(page, PROBE, tmp_path, width)
    assert (seen["images"], seen["broken"], seen["rows"]) == (7, 0, 12)
    assert seen["wide"] <= seen["window"]
    assert seen["legible"] > 0.99  # figures scroll by themselves and are not made too small to read
