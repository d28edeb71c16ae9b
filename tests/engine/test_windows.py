"""Large pictures by windows: where they lie, how they are blended, and what a shift of them changes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import run
from engine import windows
from evaluation import readout
from tests.conftest import run_small


@pytest.mark.parametrize(("length", "window", "step", "offset"), [(100, 40, 20, 0), (100, 40, 20, 8), (97, 40, 13, 5)])
def test_windows_cover_an_axis_and_stay_inside(length, window, step, offset):
    found = windows.starts(length, window, step, offset)
    covered = np.zeros(length)
    for start in found:
        assert 0 <= start <= length - window
        covered[start : start + window] += 1
    assert covered.min() >= 1
    assert (found[0], found[-1]) == (0, length - window)
    assert max(np.diff(found)) <= step
    assert windows.starts(30, 40, 20) == [0]
    if offset:
        assert found[1] % step == offset % step


def local(images: torch.Tensor) -> torch.Tensor:
    """Scores that look at a patch alone: four maps of mean colours, stride 8."""
    mean = F.avg_pool2d(images, 8)
    return torch.cat([mean, 1 - mean.mean(1, keepdim=True)], 1)


def picture(height: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(0).random((height // 12 + 2, width // 12 + 2, 3))
    smooth = F.interpolate(torch.from_numpy(draw).permute(2, 0, 1)[None], size=(height, width), mode="bilinear")
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


def test_windows_of_a_local_network_give_what_the_whole_picture_gives():
    image = picture(96, 136)
    whole = local(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    for overlap, offset in ((0.0, (0, 0)), (0.5, (0, 0)), (0.5, (8, 24)), (0.75, (13, 5))):
        found, padded = windows.blended(image, local, 40, 8, overlap, offset)
        assert padded == (96, 136)
        assert torch.allclose(found, whole, atol=1e-5)


def test_a_picture_that_is_no_multiple_is_padded_and_cut_back():
    image = picture(61, 77)
    scores, padded = windows.blended(image, local, 320, 8)
    assert padded == (64, 80)
    ids = windows.bands(readout.strips(scores, padded), (61, 77), 4)
    assert ids.shape == (61, 77)
    assert ids.dtype == np.uint8
    expected = readout.predict(scores, padded)[0, :61, :77].numpy()
    assert (ids == expected).mean() > 0.999


def contextual(images: torch.Tensor) -> torch.Tensor:
    """The local scores, changed by what the rest of the window is, as attention changes codes."""
    scores = local(images)
    return scores + 0.05 * (scores.mean((2, 3), keepdim=True) - scores)


def test_shifted_windows_disagree_on_less_than_one_percent_where_context_counts_little():
    image = picture(400, 640)
    ids = []
    for offset in ((0, 0), (24, 40)):
        scores, padded = windows.blended(image, contextual, 160, 8, 0.5, offset)
        ids.append(windows.bands(readout.strips(scores, padded), image.shape[:2], 4))
    share = (ids[0] != ids[1]).mean()
    assert 0 < share < 0.01


def test_weights_fall_to_the_edge_and_add_up_at_half_overlap():
    weight = windows.bell(20)
    assert weight.argmax() in (9, 10)
    assert weight[0] < 0.01
    assert torch.allclose(weight[:10] + weight[10:], torch.ones(10), atol=5e-3)


def test_bands_are_the_prediction_of_the_whole(monkeypatch):
    monkeypatch.setattr(readout, "BLOCK", 5 * 70 * 9)
    scores = torch.randn(1, 5, 12, 16, generator=torch.Generator().manual_seed(1))
    found = list(readout.strips(scores, (50, 70)))
    assert [first for first, _ in found] == list(range(0, 50, 9))
    ids = torch.cat([band for _, band in found])
    values = F.interpolate(scores, size=(50, 70), mode="bilinear", align_corners=False)[0]
    chosen = values.gather(0, ids[None])[0]
    assert (values.amax(0) - chosen).max() < 1e-5


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A checkpoint whose codes are patch colours: every part of `predict` without the time of a network."""
    return run_small("kmeans_baseline", tmp_path_factory.mktemp("colours"), "c", "method.features=colour").folder


@pytest.mark.train
def test_predict_by_windows_is_predict_where_a_network_sees_no_context(colours, tmp_path):
    (tmp_path / "in").mkdir()
    for name, size in (("a", (144, 240)), ("b", (30, 40))):
        Image.fromarray(picture(*size)).save(tmp_path / "in" / f"{name}.png")
    (tmp_path / "in" / "c.png").write_bytes(b"no picture")
    words = ["predict", f"ckpt={colours}/checkpoints/last.ckpt", f"input={tmp_path}/in"]
    assert run.main([*words, f"output={tmp_path}/windows", "predict.window=64", "predict.size=48"]) == 0
    assert run.main([*words, f"output={tmp_path}/whole", "predict.size=48"]) == 0
    for name in ("a", "b"):
        paths = [tmp_path / kind / "index" / f"{name}.png" for kind in ("windows", "whole")]
        found, expected = (np.asarray(Image.open(path)) for path in paths)
        assert found.shape == expected.shape
        assert (found == expected).mean() > 0.999
    assert "c.png" in (tmp_path / "windows" / "clusters.json").read_text()


@pytest.mark.train
def test_windows_and_the_crf_are_refused_together(colours, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.fromarray(picture(40, 40)).save(tmp_path / "in" / "a.png")
    words = ["predict", f"ckpt={colours}/checkpoints/last.ckpt", f"input={tmp_path}/in", f"output={tmp_path}/o"]
    assert run.main([*words, "predict.window=64", "evaluation.crf=dense"]) == 2
    line = "error: evaluation.crf=dense: is for whole pictures; set predict.window=null, or evaluation.crf=none\n"
    assert capsys.readouterr().err.endswith(line)
    assert run.main([*words, "predict.overlap=1"]) == 2
    assert capsys.readouterr().err == "error: predict.overlap=1.0: expected a number from 0 to 0.9\n"


MEASURED = """
import resource, sys
sys.path.insert(0, ".")
import run
code = run.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_picture_of_10000_by_10000_within_4_gib(colours, tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(np.tile(picture(1000, 1000), (10, 10, 1))).save(tmp_path / "in" / "large.tif")
    words = ["predict", f"ckpt={colours}/checkpoints/last.ckpt", f"input={tmp_path}/in", f"output={tmp_path}/out"]
    command = [sys.executable, "-c", MEASURED, *words, "predict.window=512"]
    done = subprocess.run(command, cwd=Path(run.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split("peak ")[1])
    assert peak < 4096
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    assert Image.open(tmp_path / "out" / "index" / "large.png").size == (10000, 10000)
    Image.MAX_IMAGE_PIXELS = limit
