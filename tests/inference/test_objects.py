"""Predicted objects: id maps at the pictures' size, and a file that COCO's own tools open."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

import run as entry
from evaluation.instances import Detections
from inference import objects
from tests.datamodules.pictures import noise, save


def test_objects_are_enlarged_without_the_padding():
    masks = torch.zeros(1, 8, 8, dtype=torch.bool)
    masks[0, 2:4, 1:3] = True
    valid = torch.zeros(1, 8, 8, dtype=torch.bool)
    valid[0, :4, :6] = True
    batch = {"valid": valid, "size": torch.tensor([[8, 18]])}
    found = Detections(masks, torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1))
    whole = objects.at_file_size(found, batch)
    assert whole.masks.shape == (1, 8, 18)
    assert whole.masks[0].nonzero().amin(0).tolist() == [4, 3]
    assert whole.masks[0].sum() == 4 * 6
    assert whole.boxes.tolist() == [[3, 4, 9, 8]]
    one = objects.annotation(whole, 0)
    assert one["bbox"] == [3, 4, 6, 4]
    assert one["area"] == 24
    none = Detections(masks[:0], found.boxes[:0], found.scores[:0])
    assert objects.at_file_size(none, batch).masks.shape == (0, 8, 18)


@pytest.mark.train
@pytest.mark.parametrize("method", ["cutler", "tokencut"])
def test_predict_writes_objects(method, small_run, tmp_path):
    run = small_run(method)
    for name, size in (("a", (60, 90)), ("deep/b", (48, 48))):
        save(tmp_path / "in" / f"{name}.png", noise(*size))
    words = [
        f"ckpt={run.folder / 'checkpoints' / 'last.ckpt'}",
        f"input={tmp_path / 'in'}",
        f"output={tmp_path / 'out'}",
    ]
    assert entry.main(["predict", *words]) == 0
    ids = np.asarray(Image.open(tmp_path / "out" / "instances" / "a.png"))
    assert ids.shape == (60, 90)
    coco = COCO(str(tmp_path / "out" / "instances.json"))
    assert len(coco.getImgIds()) == 2
    found = coco.loadAnns(coco.getAnnIds())
    assert found
    for one in found:
        size = coco.imgs[one["image_id"]]
        mask = coco.annToMask(one)
        assert mask.shape == (size["height"], size["width"])
        assert mask.sum() == one["area"]
        assert 0 <= one["score"] <= 1
    content = json.loads((tmp_path / "out" / "clusters.json").read_text())
    assert content["objects"] == len(found)
    if method == "tokencut":
        assert set(np.unique(ids)) <= {0, 1}
        assert ids.sum() == found[0]["area"] or found[0]["image_id"] != 1
