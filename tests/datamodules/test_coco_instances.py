"""COCO's objects: polygons and codes drawn, groups, both lists, label maps, what is refused."""

import json

import numpy as np
import pytest
import torch

from tests.datamodules import trees
from tests.datamodules.base.test_official import ids, module, refused


def test_objects_of_val2017_are_drawn(tmp_path):
    source = module("coco_instances", trees.coco_instances(tmp_path)).source("val")
    found = source.instances(0)
    assert found.masks.shape == (3, 60, 41)
    assert found.crowd.tolist() == [False, False, True]
    assert found.masks[0].sum() == pytest.approx(10 * 17 + 8 * 10, rel=0.1)  # both polygons are one object
    assert found.masks[0, 10, 5]
    assert found.masks[0, 35, 34]
    label = source.read(0)[1]
    assert ((label == 1) == found.masks[:2].any(0)).all()
    assert ((label == 255) == (found.masks[2] & (label != 1))).all()
    empty = source.instances(1)
    assert empty.masks.shape == (0, 41, 60)
    assert not source.read(1)[1].any()


def test_training_pictures_have_neither_labels_nor_objects(tmp_path):
    source = module("coco_instances", trees.coco_instances(tmp_path)).source("train")
    assert len(source) == 3
    assert source.read(0)[1] is None
    assert source.instances(0) is None


def test_the_list_of_2014_names_pictures_of_2017(tmp_path):
    data = module("coco_instances", trees.coco_instances(tmp_path), "data.eval_list=coco20k")
    assert ids(data.source("val")) == ["000000000003", "000000000001"]
    assert data.source("val").instances(0).masks.shape == (3, 60, 41)
    assert data.describe("val") == "val: 2 pictures of coco20k"
    own = tmp_path / "own.txt"
    own.write_text("000000000002\n")
    assert ids(module("coco_instances", tmp_path, f"data.eval_list={own}").source("val")) == ["000000000002"]


def test_batches_of_validation_carry_objects_and_groups(tmp_path):
    data = module("coco_instances", trees.coco_instances(tmp_path), "data.eval_size=24")
    data.instances = True
    batch = next(iter(data.val_dataloader()))
    assert [len(masks) for masks in batch["instances"]] == [3, 0]
    assert batch["instances.crowd"][0].tolist() == [False, False, True]
    assert batch["instances"][0].shape[1:] == batch["image"].shape[2:]
    assert torch.equal(batch["instances"][0][:2].any(0), batch["label"][0] == 1)


def test_what_is_absent_or_broken_is_a_line(tmp_path):
    trees.coco_instances(tmp_path)
    assert refused("coco_instances", tmp_path, "data.eval_list=coco2k").startswith(
        "data.eval_list=coco2k: there is no file coco2k; expected val2017, coco20k, or a text file"
    )
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for part in content["annotations"]:
        part["segmentation"] = {"size": [5, 5], "counts": "0"} if part["iscrowd"] else part["segmentation"]
    path.write_text(json.dumps(content))
    source = module("coco_instances", tmp_path).source("val")
    with pytest.raises(Exception, match="of 000000000001"):
        source.instances(0)
    path.write_text("{}")
    assert "cannot be read as annotations of COCO" in refused("coco_instances", tmp_path)
    path.unlink()
    assert f"data.root={tmp_path}: holds no annotations/instances_val2017.json" in refused("coco_instances", tmp_path)


def test_uncompressed_codes_are_drawn(tmp_path):
    trees.coco_instances(tmp_path)
    path = tmp_path / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] = [
        {"image_id": 1, "segmentation": {"size": [60, 41], "counts": [60, 30, 60 * 41 - 90]}, "iscrowd": 1}
    ]
    path.write_text(json.dumps(content))
    mask = module("coco_instances", tmp_path).source("val").instances(0).masks[0]
    assert np.flatnonzero(mask.any(0)).tolist() == [1]
    assert mask[:, 1].sum() == 30
