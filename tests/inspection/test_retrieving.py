"""`run.py retrieve`: a picture's segments find themselves in the data set, and the page shows them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from common.errors import ConfigError, DataError
from engine import setup
from inspection.retrieving import retrieve
from run import main
from tests.conftest import small_words
from tests.datamodules.pictures import save

pytestmark = pytest.mark.train


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A training picture of the small run, as a file; it is square, so it is seen as in evaluation."""
    _, data = setup.build_data(config.compose(small_words("kmeans_baseline")))
    image, _ = data.source("train").read(3)
    side = min(image.shape[:2])
    top, left = ((length - side) // 2 for length in image.shape[:2])
    return save(tmp_path_factory.mktemp("query") / "third.png", image[top : top + side, left : left + side])


def test_segments_find_themselves(picture, small_run, tmp_path):
    run = small_run("kmeans_baseline")
    _, data = setup.build_data(config.compose(small_words("kmeans_baseline")))
    own = data.source("train").id(3)
    found = retrieve(run.folder / "checkpoints" / "last.ckpt", picture, 3, tmp_path / "out", [])
    segments = found["segments"]
    assert len(segments) > 3
    areas = [entry["pixels"] for entry in segments]
    assert areas == sorted(areas, reverse=True)
    assert sum(areas) == 48 * 48
    for entry in segments:
        scores = [score for score, _ in entry["nearest"]]
        names = [found["pictures"][row] for _, row in entry["nearest"]]
        assert scores == sorted(scores, reverse=True)
        assert len(set(names)) == 3
        assert names[0] == own
        assert scores[0] > 0.99
    page = (tmp_path / "out" / "gallery.html").read_text()
    assert page.count("<figure>") == 4 * len(segments)
    assert own in page
    assert np.asarray(Image.open(tmp_path / "out" / "gallery.png")).std() > 10


def test_the_command_writes_into_the_run_folder(picture, small_run, capsys):
    run = small_run("kmeans_baseline")
    words = [f"ckpt={run.folder}/checkpoints/last.ckpt", f"image={picture}"]
    assert main(["retrieve", *words, "k=2", "evaluation.retrieval.cells=[2,2]"]) == 0
    assert (run.folder / "retrieve" / "third" / "gallery.html").is_file()
    assert main(["retrieve", *words, "k=two"]) == 2
    assert capsys.readouterr().err.endswith("k=two: expected a whole number, the nearest segments of each segment\n")


def test_what_is_refused(small_run, tmp_path):
    last = small_run("kmeans_baseline").folder / "checkpoints" / "last.ckpt"
    with pytest.raises(ConfigError) as caught:
        retrieve(last, tmp_path / "a.png", 0, None, [])
    assert str(caught.value) == "k=0: must be at least 1"
    with pytest.raises(DataError) as caught:
        retrieve(last, tmp_path / "a.png", 1, None, [])
    assert str(caught.value) == f"image={tmp_path}/a.png: no such file; name one picture"
