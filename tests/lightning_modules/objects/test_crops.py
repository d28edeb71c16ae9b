"""Vectors of objects: where crops and means are taken, and which objects are too small."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import config
from engine import setup
from engine.stages.stage import Stage
from lightning_modules.objects import crops
from models.backbone import Backbone
from tests.conftest import small_words


@pytest.fixture(scope="module")
def tiny() -> Backbone:
    return Backbone(config.compose(small_words("comus")).backbone)


def noise(height: int, width: int) -> torch.Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_crop_is_a_picture_of_its_own(tiny):
    image, boxes = noise(48, 64), torch.tensor([[8, 0, 40, 24], [0, 8, 64, 48]])
    found = crops.crop_vectors(tiny, image, boxes, 32)
    for vector, (left, top, right, bottom) in zip(found, boxes.tolist(), strict=True):
        crop = image[None, :, top:bottom, left:right]
        alone = F.interpolate(crop, (32, 32), mode="bilinear", antialias=True, align_corners=False)
        assert torch.allclose(vector, tiny.features(alone).concat().mean((2, 3))[0], atol=1e-5)


@torch.no_grad()
def test_a_trained_class_token_is_the_vector():
    backbone = Backbone(config.compose(small_words("comus", "backbone.class_token=true")).backbone)
    image = noise(32, 32)
    found = crops.crop_vectors(backbone, image, torch.tensor([[0, 0, 32, 32]]), None)
    assert torch.allclose(found, backbone.features(image[None]).cls, atol=1e-5)


def test_a_crop_of_its_own_size_is_filled_up_with_what_is_0_to_the_network(tiny):
    crop = noise(13, 20)
    canvas = crops.filled_up(tiny, crop)
    assert canvas.shape == (3, 16, 24)
    assert torch.equal(canvas[:, :13, :20], crop)
    normalised = (canvas - tiny.mean[0]) / tiny.std[0]
    assert not normalised[:, 13:].any()
    assert not normalised[:, :, 20:].any()


def test_boxes_of_a_squeezed_picture():
    batch = {"valid": torch.ones(1, 32, 32, dtype=torch.bool), "size": torch.tensor([[64, 128]])}
    boxes = torch.tensor([[64, 16, 128, 64], [127, 63, 128, 64], [0, 0, 1, 1]])
    found = crops.seen_boxes(batch, 0, torch.zeros(3, 32, 32), boxes)
    assert found.tolist() == [[16, 8, 32, 32], [31, 31, 32, 32], [0, 0, 1, 1]]


def test_means_are_of_the_cells_under_the_mask():
    maps = torch.arange(8.0).view(2, 2, 2)
    masks = torch.zeros(2, 4, 4, dtype=torch.bool)
    masks[0, :2, :2], masks[1, :, 2:] = True, True
    batch = {"valid": torch.ones(1, 16, 16, dtype=torch.bool)}
    found = crops.mean_vectors(maps, masks, (1.0, 1.0), torch.zeros(1, 3, 16, 16), batch, 0)
    assert found.tolist() == [[0, 4], [2, 6]]
    lower = crops.mean_vectors(maps, masks, (2.0, 2.0), torch.zeros(1, 3, 16, 16), batch, 0)  # masks cover more
    assert lower.tolist() == [[1.5, 5.5], [0, 0]]


@pytest.mark.train
@pytest.mark.parametrize("vectors", crops.VECTORS)
def test_records_hold_what_is_large_enough(tmp_path, vectors):
    words = ["method.masks.provider=spectral", "method.masks.objects=components", "method.objects.min_area=300"]
    words += [f"method.objects.vectors={vectors}"]
    cfg, data = setup.build_data(config.compose(small_words("comus", *words, f"cache.dir={tmp_path}")))
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    stage = Stage(cfg, data, model)
    stage.steps = {name: step for name, step in stage.steps.items() if name != "clusters"}
    results = stage.run()
    masks, objects = results["masks"], results["objects"]
    dropped = 0
    for index in range(22):
        before, after = masks.read(index), objects.read(index)
        areas = [int(np.kron(mask, np.ones((8, 8))).sum()) for mask in before.fields["masks"]]
        assert len(after.fields["masks"]) == sum(area > 300 for area in areas)
        assert after.drop == ("" if max(areas) > 300 else "too_small")
        assert np.isfinite(after.fields["features"]).all()
        for mask, box in zip(after.fields["masks"], after.fields["boxes"], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [8 * columns[0], 8 * rows[0], 8 * columns[-1] + 8, 8 * rows[-1] + 8]
        dropped += len(areas) - len(after.fields["masks"])
    assert dropped
