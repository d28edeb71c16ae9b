"""Objects one by one: from maps, through geometry, in batches of validation and in no other."""

import numpy as np
import pytest
import torch

from datamodules.base.instances import Instances
from datamodules.base.module import load_datamodule
from datamodules.base.transforms import Geometry
from datamodules.scenes.drawing import META, draw_scene, draw_things
from tests.datamodules.scenes.test_scenes import config


def test_a_map_of_ids_is_taken_apart():
    ids = np.zeros((6, 8), np.int32)
    ids[:2, :3], ids[4:, 5:], ids[3, 3] = 7, 255, 2
    found = Instances.of_map(ids, smallest=2)
    assert found.masks.sum((1, 2)).tolist() == [6, 6]
    assert not found.crowd.any()
    assert Instances.of_map(np.zeros((6, 8), int)).masks.shape == (0, 6, 8)


@pytest.mark.parametrize("crop", ["center", "none", "keep"])
def test_objects_are_cut_as_a_label_is(crop):
    ids = np.zeros((40, 64), np.int32)
    ids[5:30, 2:12], ids[10:38, 40:60] = 1, 2
    geometry = Geometry(24, crop)
    image = np.zeros((40, 64, 3), np.uint8)
    resized = geometry.resize(image, ids)
    expected = geometry.finish(*resized, np.random.default_rng(0))[1]
    found = Instances.of_map(ids).fitted(geometry, 0, np.random.default_rng(0))
    values = [value for value in (1, 2) if (expected == value).any()]
    assert found.masks.shape == (len(values), *expected.shape)
    for mask, value in zip(found.masks, values, strict=True):
        assert (mask == (expected == value)).all()
    none = Instances.of_map(ids * 0).fitted(geometry, 0, np.random.default_rng(0))
    assert none.masks.shape == (0, *expected.shape)


def test_things_of_a_scene_are_the_pixels_of_their_classes():
    several = 0
    for index in range(12):
        _, label = draw_scene(0, "val", index, 96, 128)
        things = draw_things(0, "val", index, 96, 128)
        assert ((things > 0) == np.isin(label, META.things)).all()
        for value in np.unique(things[things > 0]):
            assert len(np.unique(label[things == value])) == 1
        several += len(np.unique(things)) > 2
    assert several >= 3


def test_validation_alone_carries_objects_and_only_where_they_are_asked_for():
    cfg = config(eval_batch_size=4, train_size=64, eval_size=64)
    data = load_datamodule("scenes")(cfg)
    data.setup()
    assert "instances" not in next(iter(data.val_dataloader()))
    data.instances = True
    batch = next(iter(data.val_dataloader()))
    assert [masks.dtype for masks in batch["instances"]] == [torch.bool] * 4
    assert all(masks.shape[1:] == (64, 64) for masks in batch["instances"])
    assert [len(crowd) for crowd in batch["instances.crowd"]] == [len(masks) for masks in batch["instances"]]
    inside = torch.stack([masks.any(0) for masks in batch["instances"]])
    assert bool(torch.isin(batch["label"], torch.tensor(META.things))[inside].all())
    for loader in (data.train_dataloader(), data.loader("val"), data.loader("train")):
        assert not any("instances" in key for key in next(iter(loader)))
