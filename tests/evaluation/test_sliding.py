"""Windows of the evaluation: where they lie, what is averaged, and a run through them."""

import pytest
import torch
import torch.nn.functional as F

import run
from evaluation import sliding
from tests.conftest import read_json, run_small


def test_windows_end_evenly_and_cover_the_axis():
    assert sliding.window_ends(512, 512, 512) == [512]
    assert sliding.window_ends(720, 480, 320) == [480, 720]
    assert sliding.window_ends(1024, 480, 320) == [480, 752, 1024]
    assert sliding.window_ends(100, 480, 320) == [100]


def means(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a cell of 8 px holds, and its quarters: no context."""
    return {"codes": F.avg_pool2d(images, 8), "own": F.avg_pool2d(images, 4)[:, :1]}


@pytest.mark.parametrize("size", [(48, 80), (32, 32), (24, 104)])
def test_cells_without_context_are_those_of_the_whole_picture(size):
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found, whole = sliding.averaged(images, means, 32, 24, 8), means(images)
    for name in whole:
        torch.testing.assert_close(found[name], whole[name])


def test_cells_that_two_windows_see_get_the_mean():
    seen = []

    def numbered(part: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(tuple(part.shape[-2:]))
        return {"codes": torch.full((1, 1, part.shape[-2] // 8, part.shape[-1] // 8), float(len(seen)))}

    found = sliding.averaged(torch.zeros(1, 3, 16, 48), numbered, 32, 16, 8)
    assert seen == [(16, 32), (16, 32)]
    assert found["codes"][0, 0, 0].tolist() == [1, 1, 1.5, 1.5, 2, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["evaluation.window.size=51"],
            "evaluation.window.size=51: must be a multiple of 8 px, the network's coarsest cell; set "
            "evaluation.window.size=48",
        ),
        (
            ["evaluation.window.size=32", "evaluation.window.stride=40"],
            "evaluation.window.stride=40: must be above 0, and at most evaluation.window.size=32, or gaps are left",
        ),
        (
            ["evaluation.window.size=32", "backbone.cache_features=true", "data.train_crop=center", "data.flip_p=0"],
            "evaluation.window.size=32: kept features are those of whole pictures; set backbone.cache_features=false",
        ),
    ],
)
def test_windows_that_cannot_be_end_in_one_line(words, said, tmp_path, capsys):
    assert run.main(["train", "method=hidden_positives", "backbone=tiny", f"run.dir={tmp_path}", *words]) == 2
    assert capsys.readouterr().err.strip() == f"error: {said}"


@pytest.mark.train
@pytest.mark.parametrize("method", ["hidden_positives", "transfgu"])
def test_a_run_is_evaluated_through_windows(method, small_run):
    """One window that holds the picture changes nothing; smaller ones do, and are named."""
    whole = small_run(method)
    side = 48
    checkpoint = whole.folder / "checkpoints" / "last.ckpt"
    found = {}
    for size in (side, side // 2):
        assert run.main(["eval", f"ckpt={checkpoint}", f"evaluation.window.size={size}"]) == 0
        found[size] = read_json(whole.folder / "eval" / "last" / "metrics.json")
    assert found[side]["protocol/window"] == "48 px, at most 24 px apart"
    keys = [key for key in whole.metrics if key.startswith("val/") and key.endswith("/acc")]
    assert [found[side][key] for key in keys] == pytest.approx([whole.metrics[key] for key in keys], abs=1e-3)
    assert any(abs(found[side // 2][key] - whole.metrics[key]) > 0.1 for key in keys)


@pytest.mark.train
def test_a_run_trained_with_windows_fits_its_centroids_through_them(small_run, tmp_path):
    run_of = run_small("kmeans_baseline", tmp_path, "w", "evaluation.window.size=32")
    assert not torch.equal(
        run_of.weights["kmeans_probe.centroids"], small_run("kmeans_baseline").weights["kmeans_probe.centroids"]
    )
