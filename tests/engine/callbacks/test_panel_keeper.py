"""Panels show what `predict` shows: whole pictures, whatever part of them the scores are of."""

import numpy as np
import pytest
from PIL import Image

from engine import evaluating, training
from engine.callbacks.panel_keeper import places
from inference import predicting
from reporting import panels
from tests.conftest import run_small
from tests.datamodules.pictures import save, write_classes

pytestmark = pytest.mark.train


@pytest.fixture
def wide(tmp_path):
    """Pictures of 48 x 80 px: their centre, which is evaluated, is 48 x 48."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for number in range(count):
            picture = np.repeat(np.repeat(draw.integers(0, 255, (6, 10, 3), np.uint8), 8, 0), 8, 1)
            save(tmp_path / "pics" / "images" / split / f"{number}.png", picture)
            label = (picture[..., 0] > 128).astype(np.uint8)
            save(tmp_path / "pics" / "labels" / split / f"{number}.png", label)
    write_classes(tmp_path / "pics", ["dark", "light"])
    return tmp_path / "pics"


KEPT = ("backbone.cache_features=true", "data.train_crop=center", "data.flip_p=0", "method.lhp.attention=affinity")


@pytest.mark.parametrize(
    ("method", "words"),
    [("kmeans_baseline", ()), ("kmeans_baseline", ("evaluation.crf=dense",)), ("hidden_positives", KEPT)],
)
def test_panels_are_whole_and_those_of_predict(wide, tmp_path, monkeypatch, method, words):
    sizes = ("data.train_size=48", "data.eval_size=48", "method.num_clusters=4", "predict.probe=kmeans")
    folder = (f"data.root={wide}", f"cache.dir={tmp_path / 'cache'}", "data=folder")
    shown, kept = [], []
    monkeypatch.setattr(panels, "save", lambda path, rows, *_, **__: shown.append(rows))
    real = training.write_files

    def spied(model, pictures, *rest):
        kept.append(pictures.kept)
        real(model, pictures, *rest)

    for module in (training, evaluating):
        monkeypatch.setattr(module, "write_files", spied)
    run = run_small(method, tmp_path / "runs", "a", *folder, *sizes, "trainer.max_steps=2", *words)
    last = run.folder / "checkpoints" / "last.ckpt"
    metrics = evaluating.evaluate(last, [])
    assert metrics["protocol/crop"] == "center"
    scores = {key: value for key, value in run.metrics.items() if key.startswith("val/")}
    # Kept features have half precision, and `eval` computes its own.
    assert {key: metrics[key] for key in scores} == pytest.approx(scores, abs=0.1 if words == KEPT else 0)
    predicting.predict(last, wide / "images" / "val", tmp_path / "out", [])
    for found in kept:
        assert sorted(found) == places(3, 2)
        for item in found.values():
            assert item["image"].shape == (48, 80, 3)
            assert item["label"].shape == (48, 80)
            probe = "kmeans_crf" if "kmeans_crf" in item["maps"] else "kmeans"
            index = np.asarray(Image.open(next((tmp_path / "out" / "index").glob(f"{item['id'].split('/')[-1]}*"))))
            assert (item["maps"][probe] == index).mean() > 0.999
    assert {row.image.shape for rows in shown for row in rows} == {(48, 80, 3)}


def test_places_are_spread():
    assert places(10, 2) == [2, 7]
    assert places(1, 4) == [0]
    assert places(0, 4) == []
    assert places(5, 0) == []
