"""Large pictures by windows: where they lie, how they are blended, and what a shift of them changes."""

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import config
import run
from datamodules.scenes.drawing import draw_scene
from evaluation import readout
from inference import predicting, windows
from models.backbone import Backbone
from retrieval import kmeans
from tests.conftest import run_small


def seen_by(size: tuple[int, int], sides: tuple[int, int], overlap: float, offset: tuple[int, int]) -> np.ndarray:
    """How many windows see each patch; every window lies inside."""
    count = np.zeros(size, dtype=int)
    for top, left in windows.places(size, sides, overlap, offset):
        assert 0 <= top <= size[0] - sides[0]
        assert 0 <= left <= size[1] - sides[1]
        count[top : top + sides[0], left : left + sides[1]] += 1
    return count


@pytest.mark.parametrize("side", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75, 0.95])
def test_windows_leave_no_gap(side, overlap):
    for rows, columns, offset in ((0, 0, (0, 0)), (0, 23, (5, 3)), (9, 0, (0, 1)), (1, 2, (7, 40)), (31, 18, (2, 9))):
        assert seen_by((side + rows, side + columns), (side, side), overlap, offset).min() >= 1
    assert list(windows.places((30, 40), (30, 40), overlap)) == [(0, 0)]
    assert seen_by((30, 60), (30, 40), overlap, (3, 3)).min() >= 1


def test_every_patch_is_seen_at_as_many_rows_and_columns_of_a_window_as_there_are_windows():
    size, side = (120, 110), 16
    inside = seen_by(size, (side, side), 0.75, (5, 7))[30:-30, 30:-30]
    assert (inside.min(), inside.max()) == (19, 20)  # 256 / 13
    a, b = windows.inclined(side, 0.75)
    assert (a, b) == (3, 2)
    lattice = {place for place, weight in windows.places(size, (side, side), 0.75).items() if weight == 1}
    for axis in (0, 1):
        assert {place[axis] % (a * a + b * b) for place in lattice} == set(range(13))
    shifted = windows.places(size, (side, side), 0.75, (4, 9))
    assert {(top + 4, left + 9) for top, left in lattice if top < 80 and left < 80} <= set(shifted)


@pytest.mark.parametrize(("side", "overlap", "step"), [(16, 0.75, 1), (16, 0.85, 1), (40, 0.75, 3), (16, 0.5, 5)])
def test_the_border_is_seen_by_windows_of_its_own(side, overlap, step):
    size, offset = (150, 140), (7, 4)
    first_row = seen_by(size, (side, side), overlap, offset)[0, side:-side]
    assert side // step <= first_row.min() <= first_row.max() <= -(-side // step) + 1
    a, b = windows.inclined(side, overlap)
    found = windows.places(size, (side, side), overlap, offset)
    last = [whole - side for whole in size]
    for (top, left), weight in found.items():
        outer = top in (0, last[0]) or left in (0, last[1])
        assert weight == pytest.approx(step / math.hypot(a, b) if outer else 1)
    assert {top for top, left in found if not left} == {0, last[0], *range(offset[0] % step, last[0], step)}


def test_lattices_have_no_even_period_along_an_axis():
    for side in range(1, 65):
        for overlap in (0.0, 0.5, 0.75, 0.9, 0.95):
            a, b = windows.inclined(side, overlap)
            assert a + b <= side
            assert (a * a + b * b) % 2 == 1
            assert math.gcd(a, b) == 1


def local(images: torch.Tensor) -> torch.Tensor:
    """Scores that look at a patch alone: four maps of mean colours, stride 8."""
    mean = F.avg_pool2d(images, 8)
    return torch.cat([mean, 1 - mean.mean(1, keepdim=True)], 1)


def picture(height: int, width: int) -> np.ndarray:
    draw = np.random.default_rng(0).random((height // 12 + 2, width // 12 + 2, 3))
    smooth = F.interpolate(torch.from_numpy(draw).permute(2, 0, 1)[None], size=(height, width), mode="bilinear")
    return (smooth[0].permute(1, 2, 0) * 255).byte().numpy()


@pytest.mark.train
def test_windows_of_a_local_network_give_what_the_whole_picture_gives():
    image = picture(96, 136)
    whole = local(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255)
    for overlap, offset in ((0.0, (0, 0)), (0.5, (0, 0)), (0.5, (8, 24)), (0.75, (13, 5))):
        found, padded = windows.blended(image, local, 40, 8, overlap, offset)
        assert padded == (96, 136)
        assert torch.allclose(found, whole, atol=1e-5)


@pytest.mark.train
def test_a_picture_that_is_no_multiple_is_padded_and_cut_back():
    image = picture(61, 77)
    scores, padded = windows.blended(image, local, 320, 8)
    assert padded == (64, 80)
    ids = windows.bands(readout.strips(scores, padded), (61, 77), 4)
    assert ids.shape == (61, 77)
    assert ids.dtype == np.uint8
    expected = readout.predict(scores, padded)[0, :61, :77].numpy()
    assert (ids == expected).mean() > 0.999


@pytest.fixture(scope="module")
def clustered() -> Callable[[torch.Tensor], torch.Tensor]:
    """Scores of the bundled transformer: twelve k-means centroids of its features on scenes, at its own size."""
    backbone = Backbone(config.compose(["backbone=tiny"]).backbone)
    scenes = torch.from_numpy(np.stack([draw_scene(0, "train", i, 128, 128)[0] for i in range(12)]))
    codes = backbone.features(scenes.permute(0, 3, 1, 2).float() / 255).map
    found = kmeans.fit(F.normalize(codes.permute(0, 2, 3, 1).flatten(0, 2), dim=1), 12, seed=0).centroids
    return lambda images: readout.dot_products(backbone.features(images).map, found)


def straight(size: tuple[int, int], sides: tuple[int, int], overlap: float, offset: tuple[int, int]) -> dict:
    """Windows at the same step of 4 patches along rows and columns, as a plain sliding window has them."""
    starts = [
        sorted({0, whole - side, *range(shift % 4, whole - side, 4)})
        for whole, side, shift in zip(size, sides, offset, strict=True)
    ]
    return {(top, left): 1.0 for top in starts[0] for left in starts[1]}


def differing(scores_of: Callable[[torch.Tensor], torch.Tensor], overlap: float | None, shifts: tuple) -> float:
    """The largest share of a scene's pixels that two shifts of the windows give different clusters."""
    image, _ = draw_scene(0, "val", 3, 208, 208)
    found = []
    for shift in shifts:
        scores, padded = windows.blended(image, scores_of, 128, 8, overlap, shift, transformer=True)
        found.append(windows.bands(readout.strips(scores, padded), image.shape[:2], 12))
    return max((one != other).mean() for one, other in itertools.combinations(found, 2))


def test_shifted_windows_of_the_bundled_transformer_agree(clustered, monkeypatch):
    """Its attention spans the window, and its position embedding holds a pattern of about two patches, which an even
    step keeps. Measured: 0.8 % of the pixels at most, 1.5 % with `overlap=0.75`, 1.6 % where the border has no windows
    of its own and a raised cosine weighs them, 5.3 % on a straight grid."""
    shifts = ((0, 0), (8, 16), (24, 40), (16, 56), (8, 0))
    share = differing(clustered, None, shifts)
    assert 0 < share < 0.01
    monkeypatch.setattr(windows, "places", straight)
    assert share < differing(clustered, 0.75, shifts[:2]) / 4


@pytest.mark.train
def test_a_transformer_takes_more_windows_unless_the_overlap_is_given(monkeypatch):
    asked = []
    whole = windows.places
    monkeypatch.setattr(windows, "places", lambda *given: (asked.append(given[2]), whole(*given))[1])
    for transformer in (True, False):
        backbone = SimpleNamespace(transformer=transformer, unit=8)
        for words in ([], ["predict.overlap=0.5"]):
            model = SimpleNamespace(backbone=backbone, device="cpu")
            cfg = config.compose(["predict.window=32", *words])
            predicting.windowed_ids(np.zeros((32, 40, 3), np.uint8), (32, 40), local, model, cfg)
    assert asked == [0.85, 0.5, 0.75, 0.5]


@pytest.mark.parametrize("power", windows.POWER.values())
def test_weights_fall_to_the_edge_and_are_nowhere_zero(power):
    weight = windows.bell(20, power)
    assert torch.allclose(weight, weight.flip(0), atol=1e-6)
    assert (weight[:10].diff() > 0).all()
    assert 0 < weight[0] < 0.1
    assert weight[9] > 0.98
    half = weight ** (2 / power)
    assert torch.allclose(half[:10] + half[10:], torch.ones(10), atol=1e-5)
    assert windows.bell(1, power) == 1


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
    assert capsys.readouterr().err == (
        "error: predict.overlap=1: expected a number from 0 to 0.95, or null for what suits the network\n"
    )


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
    command = [sys.executable, "-c", MEASURED, *words, "predict.window=512", "predict.overlap=0.5"]
    done = subprocess.run(command, cwd=Path(run.__file__).parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split("peak ")[1])
    assert peak < 4096
    Image.MAX_IMAGE_PIXELS, limit = None, Image.MAX_IMAGE_PIXELS
    assert Image.open(tmp_path / "out" / "index" / "large.png").size == (10000, 10000)
    Image.MAX_IMAGE_PIXELS = limit
