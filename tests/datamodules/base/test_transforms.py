"""Geometry on the CPU against torchvision, replayable crops against exact answers, views against torchvision."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from common.errors import ConfigError
from common.spec import IGNORE, Geometric, Photometric, ViewSpec
from datamodules.base import transforms, views
from datamodules.base.transforms import Geometry, Replay, replay
from tests.datamodules.pictures import config

SIZES = [(37, 50), (50, 37), (33, 33), (101, 64), (24, 90), (16, 17)]


def pair(height, width, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image, rng.integers(0, 256, (height, width), dtype=np.uint8)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("crop", ["center", "none"])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_resize_and_crop_equals_torchvision_on_pillow(shape, crop, interpolation):
    image, label = pair(*shape)
    size = 24 if crop == "center" else (24, 24)
    how = {"nearest": InterpolationMode.NEAREST, "bilinear": InterpolationMode.BILINEAR}[interpolation]
    expected = tv.center_crop(tv.resize(Image.fromarray(image), size, how), 24)
    ids = tv.center_crop(tv.resize(Image.fromarray(label), size, InterpolationMode.NEAREST), 24)
    got, got_ids = transforms.resize_and_crop(image, label, 24, crop, interpolation)
    np.testing.assert_array_equal(got, np.asarray(expected))
    np.testing.assert_array_equal(got_ids, np.asarray(ids))


def test_loader_transform_is_the_released_one():
    image, label = pair(37, 50)
    got, ids = transforms.loader_transform(image, label, 24, "center")
    expected = tv.to_tensor(tv.center_crop(tv.resize(Image.fromarray(image), 24, InterpolationMode.NEAREST), 24))
    assert torch.equal(got, expected)
    assert got.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert ids.shape == (24, 24)


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("ratio", [0.5, 0.7])
def test_five_crop_boxes_equal_torchvision(shape, ratio):
    height, width = shape
    position = torch.arange(height * width).view(1, height, width)
    boxes = transforms.five_crop_boxes(height, width, ratio)
    expected = tv.five_crop(position, [int(height * ratio), int(width * ratio)])
    for (top, left, h, w), crop in zip(boxes, expected, strict=True):
        assert torch.equal(position[:, top : top + h, left : left + w], crop)


def test_keep_and_random_and_cover():
    image, label = pair(40, 60)
    kept, ids = transforms.resize_and_crop(image, label, 20, "keep")
    assert kept.shape == (20, 30, 3)
    assert ids.shape == (20, 30)
    wide, _ = transforms.resize_and_crop(image, None, (20, 50), "center")
    assert wide.shape == (20, 50, 3)
    whole = transforms.resize_and_crop(image, label, 20, "keep", "nearest")
    seen = set()
    for i in range(40):
        got, got_ids = transforms.resize_and_crop(image, label, 20, "random", "nearest", np.random.default_rng(i))
        left = [x for x in range(11) if np.array_equal(whole[0][:, x : x + 20], got)]
        assert len(left) == 1
        np.testing.assert_array_equal(whole[1][:, left[0] : left[0] + 20], got_ids)
        seen.add(left[0])
    assert seen == set(range(11))


def test_labels_keep_their_values_and_16_bit_ids():
    _, label = pair(50, 70)
    label = label.astype(np.int32) + 1000
    _, got = transforms.resize_and_crop(np.zeros((50, 70, 3), np.uint8), label, 21, "center")
    assert set(np.unique(got)) <= set(np.unique(label))


def test_five_geometry_cuts_before_it_resizes():
    image, label = pair(40, 60)
    geometry = Geometry(size=10, crop="five", interpolation="nearest")
    assert geometry.crops == 5
    resized, ids = geometry.resize(image, label, 3)
    got, got_ids = geometry.finish(resized, ids, np.random.default_rng(0))
    expected, expected_ids = transforms.resize_and_crop(image[20:, 30:], label[20:, 30:], 10, "center", "nearest")
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(got_ids, expected_ids)


def test_flip_takes_the_label_along():
    image, label = pair(10, 10)
    geometry = Geometry(size=10, flip_p=1.0)
    got, ids = geometry.finish(image, label, np.random.default_rng(0), flip=True)
    np.testing.assert_array_equal(got, image[:, ::-1])
    np.testing.assert_array_equal(ids, label[:, ::-1])
    np.testing.assert_array_equal(geometry.finish(image, label, np.random.default_rng(0))[0], image)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({"train_size": "big"}, "data.train_size=big: must be a whole number of pixels (shorter side), or [H,W]"),
        (
            {"train_size": [8, 9, 10]},
            "data.train_size=[8, 9, 10]: must be a whole number of pixels (shorter side), or [H,W]",
        ),
        ({"train_crop": "middle"}, "data.train_crop=middle: must be one of center, random, five, none, keep"),
        ({"eval_crop": "five"}, "data.eval_crop=five: must be one of center, none, keep"),
        (
            {"eval_crop": "keep", "eval_size": [16, 32]},
            "data.eval_size=[16, 32]: with data.eval_crop=keep it must be one number, the shorter side",
        ),
        (
            {"interpolation": "cubic"},
            "data.interpolation=cubic: must be one of faithful, nearest, bilinear, bilinear_plain, nearest_corner",
        ),
        ({"flip_p": 1.5}, "data.flip_p=1.5: must be 0 to 1"),
        ({"five_crop_ratio": 0}, "data.five_crop_ratio=0: must be above 0 to 1"),
    ],
)
def test_config_errors(data, text):
    cfg = config(**data).data
    with pytest.raises(ConfigError) as error:
        [Geometry.from_config(cfg, split) for split in ("train", "eval")]
    assert str(error.value) == text


# ---- replay ----


def crop_params(boxes, flips, source, size):
    return Replay(torch.tensor(boxes, dtype=torch.float32), torch.tensor(flips), source, size)


def test_replay_nearest_is_an_exact_crop_and_flip():
    ids = torch.randint(0, 10**9, (2, 12, 16))
    params = crop_params([[2, 3, 6, 8], [0, 8, 12, 8]], [False, True], (12, 16), (6, 8))
    got = replay(ids, params, "nearest")
    assert torch.equal(got[0], ids[0, 2:8, 3:11])
    assert torch.equal(got[1], ids[1, 1::2, 8:].flip(-1))
    assert got.dtype == torch.int64


def test_replay_outside_the_frame_is_ignore_false_or_zero():
    params = crop_params([[-2, 0, 4, 4]], [False], (4, 4), (4, 4))
    assert replay(torch.ones(1, 4, 4, dtype=torch.long), params, "nearest")[0, :, 0].tolist() == [IGNORE, IGNORE, 1, 1]
    assert replay(torch.ones(1, 4, 4, dtype=torch.bool), params, "nearest")[0, :, 0].tolist() == [
        False,
        False,
        True,
        True,
    ]
    assert replay(torch.ones(1, 1, 4, 4), params, "bilinear", fill=-1)[0, 0, :, 0].tolist() == [-1, -1, 1, 1]
    assert replay(torch.ones(1, 1, 4, 4), params, "bilinear")[0, 0, :, 0].tolist() == [1, 1, 1, 1]


def test_replay_on_a_feature_map_follows_the_picture():
    """A coordinate grid of a coarse map, replayed, tells where the pixels of the view came from."""
    params = crop_params([[8, 16, 16, 32], [0, 0, 32, 64]], [False, True], (32, 64), (32, 64))
    fine_y, fine_x = torch.meshgrid(torch.arange(32) + 0.5, torch.arange(64) + 0.5, indexing="ij")
    coarse_y, coarse_x = torch.meshgrid(torch.arange(8) * 4 + 2.0, torch.arange(16) * 4 + 2.0, indexing="ij")
    fine = replay(torch.stack([fine_y, fine_x]).expand(2, -1, -1, -1), params)
    coarse = replay(torch.stack([coarse_y, coarse_x]).expand(2, -1, -1, -1), params)
    assert coarse.shape == (2, 2, 8, 16)
    torch.testing.assert_close(torch.nn.functional.avg_pool2d(fine, 4)[0], coarse[0])
    assert coarse[1, 1, 0, 0] == 62.0
    assert replay(torch.rand(2, 3, 8, 16), params, size=(5, 7)).shape == (2, 3, 5, 7)


def test_replay_carries_gradient_and_half_floats_and_refuses_integers():
    params = crop_params([[1, 1, 4, 4]], [True], (8, 8), (8, 8))
    features = torch.rand(1, 2, 8, 8, requires_grad=True)
    replay(features, params).sum().backward()
    assert features.grad.abs().sum() > 0
    assert replay(torch.rand(1, 2, 8, 8, dtype=torch.bfloat16), params).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="needs mode='nearest'"):
        replay(torch.ones(1, 8, 8, dtype=torch.long), params)


def test_drawn_boxes_stay_inside_and_cover_the_scale():
    spec = Geometric(scale=(0.2, 0.6), flip_p=0.5)
    params = transforms.draw_geometry(spec, 400, (48, 64), np.random.default_rng(0))
    top, left, height, width = params.boxes.unbind(1)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 48).all()
    assert (left + width <= 64).all()
    share = height * width / (48 * 64)
    assert 0.18 < share.min() < 0.25
    assert 0.5 < share.max() < 0.63
    assert 150 < params.flip.sum() < 250


def test_a_frame_that_no_box_fits_gets_the_central_one():
    params = transforms.draw_geometry(Geometric(scale=(1, 1)), 3, (10, 100), np.random.default_rng(0))
    assert params.boxes.tolist() == [[0, 44, 10, 13]] * 3


# ---- views ----


@pytest.mark.parametrize("faithful", [False, True])
def test_colour_equals_torchvision(faithful):
    spec = Photometric(faithful=faithful)
    image = torch.rand(12, 3, 20, 26, generator=torch.Generator().manual_seed(0))
    drawn = views.draw_colour(spec, 12, np.random.default_rng(2))
    assert drawn.gray.any()
    assert drawn.blur.any()
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (views.IMAGENET_MEAN, views.IMAGENET_STD))
    steps = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    got = views.recolour(image, spec, drawn)
    for i in range(12):
        expected = (image[i] - mean) / std if faithful else image[i]
        for number in drawn.order[i]:
            expected = steps[number](expected, float(drawn.factors[i, number]))
        if drawn.gray[i]:
            expected = tv.rgb_to_grayscale(expected, 3)
        if drawn.blur[i]:
            expected = tv.gaussian_blur(expected, [5, 5], [float(drawn.sigma[i])] * 2)
        expected = expected * std + mean if faithful else expected
        torch.testing.assert_close(got[i], expected, atol=1e-5, rtol=0)


def test_colour_strength_zero_changes_nothing():
    spec = Photometric(brightness=0, contrast=0, saturation=0, hue=0, gray_p=0, blur_p=0)
    image = torch.rand(3, 3, 8, 8)
    got = views.recolour(image, spec, views.draw_colour(spec, 3, np.random.default_rng(0)))
    torch.testing.assert_close(got, image, atol=1e-5, rtol=0)


def batch_of(count=4, height=16, width=20):
    position = torch.arange(height * width).view(1, height, width).expand(count, -1, -1)
    return {
        "image": torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1)),
        "label": position % 7,
        "valid": torch.ones(count, height, width, dtype=torch.bool),
        "segments": position.clone(),
        "index": torch.arange(count),
    }


def test_views_carry_their_maps_through_the_same_geometry():
    specs = {
        "crop": ViewSpec(geometric=Geometric(scale=(0.3, 0.6))),
        "strong": ViewSpec(photometric=Photometric(), source="crop"),
    }
    batch = views.make_views(batch_of(), specs, seed=0, step=4)
    params = batch["crop.params"]
    assert torch.equal(batch["crop.segments"], replay(batch["segments"], params, "nearest"))
    assert torch.equal(batch["crop.label"], batch["crop.segments"] % 7)
    assert batch["crop.valid"].all()
    assert torch.equal(batch["crop"], replay(batch["image"], params))
    assert torch.equal(batch["strong.segments"], batch["crop.segments"])
    assert batch["strong"].shape == batch["crop"].shape
    assert not torch.equal(batch["strong"], batch["crop"])
    assert not torch.equal(batch["crop.segments"], batch["segments"])


def test_views_are_keyed_by_seed_name_and_step():
    spec = ViewSpec(photometric=Photometric(), geometric=Geometric())

    def make(seed, step, name="v"):
        return views.make_views(batch_of(), {name: spec}, seed, step)[name]

    assert torch.equal(make(0, 3), make(0, 3))
    for other in (make(0, 4), make(1, 3), make(0, 3, "w")):
        assert not torch.equal(make(0, 3), other)


def test_a_rank_sees_its_slice_of_the_global_views(monkeypatch):
    specs = {"v": ViewSpec(photometric=Photometric(), geometric=Geometric(size=12))}
    whole = views.make_views(batch_of(6), specs, 0, 2)
    parts = []
    for rank in range(2):
        monkeypatch.setattr("common.distributed.rank", lambda rank=rank: rank)
        monkeypatch.setattr("common.distributed.world_size", lambda: 2)
        mine = {key: value[rank * 3 : rank * 3 + 3] for key, value in batch_of(6).items()}
        parts.append(views.make_views(mine, specs, 0, 2))
    torch.testing.assert_close(torch.cat([part["v"] for part in parts]), whole["v"], atol=1e-6, rtol=0)
    assert torch.equal(torch.cat([part["v.segments"] for part in parts]), whole["v.segments"])


@pytest.mark.parametrize(
    ("name", "spec", "text"),
    [
        ("v", ViewSpec(source="w"), "view 'v': its source 'w' must be 'image' or a view that stands before it"),
        ("label", ViewSpec(), "view 'label': the name must be new in the batch and without a dot"),
        ("v", ViewSpec(Photometric(hue=0.7)), "view 'v': hue=0.7 must be 0 to 0.5 (of a full turn)"),
        ("v", ViewSpec(Photometric(blur_kernel=4)), "view 'v': blur_kernel=4 must be an odd number of pixels"),
    ],
)
def test_views_that_cannot_be(name, spec, text):
    with pytest.raises(ConfigError) as error:
        views.make_views(batch_of(), {name: spec}, 0, 0)
    assert str(error.value) == text


def test_places_of_one_view_in_another():
    """Source coordinates read in the second view, where the first one says, are those of the first one's cells."""
    size = (64, 96)
    spec = Geometric(size=32, scale=(0.3, 0.6))
    one, two = (transforms.draw_geometry(spec, 16, size, np.random.default_rng(n)) for n in range(2))
    rows, columns = torch.meshgrid(torch.arange(64) + 0.5, torch.arange(96) + 0.5, indexing="ij")
    coordinates = torch.stack([rows, columns]).expand(16, -1, -1, -1)
    places, inside = transforms.meeting(one, two, (8, 8))
    assert places.shape == (16, 8, 8, 2)
    assert 0.1 < inside.float().mean() < 0.9
    assert one.flip.any()
    assert not one.flip.all()
    wanted = transforms.replay(coordinates, one, size=(8, 8))
    view = transforms.replay(coordinates, two)
    found = torch.nn.functional.grid_sample(view, places, padding_mode="border", align_corners=False)
    away = (found - wanted).abs().amax(1)[inside]
    assert away.max() < 1.2  # pixels of the source: bilinear at the border of the second view is off by half a cell
    assert away.median() < 1e-3


def test_a_coin_decides_between_jitter_and_grey():
    spec = Photometric(jitter_p=1.0, gray_p=1.0, either=True)
    drawn = views.draw_colour(spec, 400, np.random.default_rng(0))
    assert (drawn.jitter ^ drawn.gray).all()
    assert 150 < drawn.jitter.sum() < 250
    rare = views.draw_colour(Photometric(jitter_p=0.3, gray_p=0.1, either=True), 4000, np.random.default_rng(0))
    assert rare.jitter.mean() == pytest.approx(0.15, abs=0.02)
    assert rare.gray.mean() == pytest.approx(0.05, abs=0.02)
    plain = views.draw_colour(Photometric(), 9, np.random.default_rng(3))
    both = views.draw_colour(Photometric(either=True), 9, np.random.default_rng(3))
    assert np.array_equal(plain.factors, both.factors)
    assert np.array_equal(plain.blur, both.blur)
