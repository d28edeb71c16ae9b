"""The dense CRF: its lattice against exact Gaussians, its mean field, batches, padding, and the runs that use it."""

import csv

import pytest
import torch

from common.errors import ConfigError
from engine import evaluating
from evaluation import crf
from evaluation.crf import Constants, DenseCRF, Lattice
from inference import predicting
from tests.conftest import read_json, run_small


def picture(seed: int, height: int, width: int) -> torch.Tensor:
    """uint8 [3,H,W]: two areas of different colour, with noise."""
    noise = torch.randint(0, 12, (3, height, width), generator=torch.Generator().manual_seed(seed))
    noise[:, :, width // 2 :] += 120
    return noise.to(torch.uint8)


def beliefs(seed: int, classes: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(1, classes, height, width, generator=generator)).log_softmax(1)


@pytest.mark.parametrize("d", [2, 5])
def test_the_normalised_filter_is_near_the_exact_gaussian(d):
    generator = torch.Generator().manual_seed(d)
    points = 1.5 * torch.rand(1, 400, d, generator=generator)
    values = torch.rand(400, 3, generator=generator)
    kernel = torch.exp(-torch.cdist(points[0], points[0]).square() / 2)
    norm = kernel.sum(1).rsqrt()
    exact = norm[:, None] * (kernel @ (norm[:, None] * values))
    found = Lattice(points, 1.0)(values)
    assert (found - exact).abs().mean() < 0.02
    torch.testing.assert_close(Lattice(points, 3.0)(values), 3 * found)
    total = torch.rand(400, 3, generator=generator)
    torch.testing.assert_close(Lattice(points, 1.0).add_to(total, values), total + found)


def test_weights_of_a_simplex_are_shares():
    points = 9 * torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    remainder, rank, weights = crf._simplices(points)
    assert (weights > -1e-5).all()
    torch.testing.assert_close(weights.sum(1), torch.ones(300), atol=1e-5, rtol=0)
    assert (remainder.sum(1) == 0).all()
    assert torch.equal(rank.sort(1).values, torch.arange(6).expand(300, 6))


def test_a_mean_field_without_kernels_is_the_softmax():
    maps = beliefs(0, 3, 6, 7)
    off = DenseCRF(Constants(gauss_weight=0, bilateral_weight=0))
    (found,) = off(picture(0, 6, 7)[None], [maps])
    torch.testing.assert_close(found, maps.softmax(1), atol=2e-5, rtol=1e-4)


def test_stray_pixels_join_their_area():
    image = picture(0, 24, 24)
    clear = torch.full((1, 2, 24, 24), 0.3)
    clear[:, 0, :, :12], clear[:, 1, :, 12:] = 0.7, 0.7
    clear[:, :, 5, 5] = clear[:, :, 5, 5].flip(1)
    (found,) = DenseCRF()(image[None], [clear.log()])
    expected = (torch.arange(24) >= 12).long().expand(24, 24)
    assert torch.equal(found[0].argmax(0), expected)
    torch.testing.assert_close(found.sum(1), torch.ones(1, 24, 24))


def test_pictures_and_read_outs_do_not_touch_each_other(monkeypatch):
    images = torch.stack([picture(1, 16, 20), picture(2, 16, 20).flip(-1)])
    maps = [torch.cat([beliefs(i + 10 * j, k, 16, 20) for i in range(2)]) for j, k in enumerate((3, 5))]
    single = [[DenseCRF()(images[i : i + 1], [part[i : i + 1]])[0] for i in range(2)] for part in maps]
    for block in (1, 1 << 20):
        monkeypatch.setitem(crf.BLOCK_PIXELS, "cpu", block)
        for found, alone in zip(DenseCRF()(images, maps), single, strict=True):
            torch.testing.assert_close(found, torch.cat(alone), atol=1e-5, rtol=1e-4)


def test_smaller_maps_are_brought_to_the_picture():
    image, maps = picture(3, 16, 16)[None], beliefs(3, 4, 4, 4)
    large = torch.nn.functional.interpolate(maps, size=(16, 16), mode="bilinear")
    assert torch.equal(DenseCRF()(image, [maps])[0], DenseCRF()(image, [large])[0])


def test_spatial_lattices_are_kept_by_size_and_the_oldest_goes(monkeypatch):
    monkeypatch.setattr(crf, "KEPT_SIZES", 2)
    field = DenseCRF(Constants(iterations=1))
    lattices = []
    for side in (6, 7, 6, 8):
        field(picture(0, side, side)[None], [beliefs(0, 2, side, side)])
        lattices.append(field._spatial_lattice(picture(0, side, side)[None]))
    assert lattices[0] is lattices[2]
    assert [key[-3:-1] for key in field._spatial] == [(6, 6), (8, 8)]


def test_padding_takes_no_part():
    image = torch.zeros(2, 3, 16, 24)
    image[0, :, :12, :20] = picture(4, 12, 20) / 255
    image[1] = picture(5, 16, 24) / 255
    valid = torch.zeros(2, 16, 24, dtype=torch.bool)
    valid[0, :12, :20] = valid[1] = True
    maps = torch.cat([beliefs(i, 3, 16, 24) for i in range(2)])
    (ids,) = DenseCRF().predict(image, valid, [maps])
    alone = DenseCRF()(picture(4, 12, 20)[None], [maps[:1, :, :12, :20]])[0].argmax(1)[0]
    assert torch.equal(ids[0, :12, :20], alone)
    assert torch.equal(ids[0, 12:], maps[0].argmax(0)[12:])
    assert torch.equal(ids[1], DenseCRF()(picture(5, 16, 24)[None], [maps[1:]])[0].argmax(1)[0])


def test_bytes_are_those_of_the_file():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(crf.as_bytes(values.float().div(255)), values)
    assert crf.as_bytes(torch.tensor([-0.5, 1.5])).tolist() == [0, 255]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [("iterations", 0, "must be above 0"), ("bilateral_srgb", -1.0, "must be above 0"),
     ("gauss_weight", -0.5, "must not be negative")],
)  # fmt: skip
def test_constants_that_cannot_be_are_refused(name, value, rule):
    with pytest.raises(ConfigError) as caught:
        Constants(**{name: value}).check("evaluation.crf_constants")
    assert str(caught.value) == f"evaluation.crf_constants.{name}={value}: {rule}"


def test_a_kernel_too_narrow_for_its_keys_is_refused():
    with pytest.raises(ConfigError, match=r"evaluation\.crf_constants: the kernels are so narrow"):
        DenseCRF(Constants(bilateral_srgb=1e-3, bilateral_sxy=1e-3))(picture(0, 40, 40)[None], [beliefs(0, 2, 40, 40)])


@pytest.mark.train
def test_eval_and_predict_refine_on_request_and_say_so(small_run, tmp_path):
    run = small_run("stego")
    last = run.folder / "checkpoints" / "last.ckpt"
    metrics = evaluating.evaluate(last, ["evaluation.crf=dense", "evaluation.crf_constants.iterations=2"])
    for probe in ("cluster", "kmeans", "linear"):
        assert 0 <= metrics[f"val/{probe}_crf/miou"] <= 100
        assert metrics[f"val/{probe}/miou"] == run.metrics[f"val/{probe}/miou"]
    assert metrics["val/linear_crf/acc"] != metrics["val/linear/acc"]
    assert metrics["protocol/crf"] == ("dense, 2 iterations, smoothness 3 (1 px), appearance 4 (67 px, 3 of 255)")
    assert run.metrics["protocol/crf"] is False
    assert not [key for key in run.metrics if "_crf" in key]
    pictures = tmp_path / "in"
    pictures.mkdir()
    for i, size in enumerate(((40, 56), (64, 64))):
        pixels = picture(i, *size).permute(1, 2, 0).numpy()
        predicting.panels.Image.fromarray(pixels).save(pictures / f"{i}.png")
    plain, refined = tmp_path / "plain", tmp_path / "refined"
    predicting.predict(last, pictures, plain, [])
    predicting.predict(last, pictures, refined, ["evaluation.crf=dense"])
    assert read_json(refined / "clusters.json")["pictures"] == 2
    changed = [
        (plain / "index" / f"{i}.png").read_bytes() != (refined / "index" / f"{i}.png").read_bytes() for i in (0, 1)
    ]
    assert any(changed)


@pytest.mark.train
def test_a_run_ends_with_refined_scores_and_validates_without_while_it_trains(tmp_path):
    words = ["evaluation.crf=dense", "evaluation.crf_constants.iterations=1", "trainer.max_steps=5"]
    run = run_small("kmeans_baseline", tmp_path, "x", *words)
    assert 0 <= run.metrics["val/kmeans_crf/miou"] <= 100
    assert 0 <= run.metrics["val/linear_crf/acc"] <= 100
    with (run.folder / "metrics.csv").open() as handle:
        rows = [row for row in csv.DictReader(handle) if row["val/cluster/miou"]]
    assert [bool(row["val/cluster_crf/miou"]) for row in rows] == [False, True]  # step 4, and the closing evaluation
    mapped = run.checkpoint["labelfree"]["clusters"]
    assert {"kmeans", "kmeans_crf"} <= set(mapped)
    assert not [probe for probe in mapped if probe.startswith("linear")]
