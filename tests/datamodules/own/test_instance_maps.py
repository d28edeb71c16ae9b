"""Maps of objects beside a user's pictures: where they lie, what they hold, what is refused."""

from pathlib import Path

import numpy as np
import pytest

import config
from common.errors import DataError
from datamodules.base.module import load_datamodule
from datamodules.own import instance_maps
from tests.datamodules.pictures import noise, save


def objects(height=24, width=32):
    ids = np.zeros((height, width), np.uint16)
    ids[2:8, 3:9], ids[10:20, 12:30] = 7, 300
    return ids


def folder(root: Path, order=("images", "val")) -> Path:
    for split in ("train", "val"):
        for name in ("a", "deep/b", "c"):
            place = Path(*(split if part == "val" else part for part in order))
            save(root / place / f"{name}.jpg", noise())
            if name != "c":
                save(root / str(place).replace("images", "instances") / f"{name}.png", objects())
    return root


@pytest.mark.parametrize("order", [("images", "val"), ("val", "images")])
def test_they_lie_in_the_place_of_the_pictures(tmp_path, order):
    cfg = config.compose(
        ["data=folder", f"data.root={folder(tmp_path, order)}", "data.workers=0", "data.eval_size=16",
         "data.train_size=16", "data.batch_size=2"]
    )  # fmt: skip
    data = load_datamodule("folder")(cfg)
    source = data.source("val")
    found = {source.id(index): source.instances(index) for index in range(len(source))}
    assert found["c.jpg" if "c.jpg" in found else "c"] is None
    masks = next(one for name, one in found.items() if name.startswith("a")).masks
    assert masks.sum((1, 2)).tolist() == [36, 180]
    data.instances = True
    batch = next(iter(data.val_dataloader()))
    assert sum(masks is None for masks in batch["instances"]) == 1
    assert "instances" not in next(iter(data.train_dataloader()))


def test_a_map_of_another_size_is_a_line(tmp_path):
    root = folder(tmp_path)
    save(root / "instances" / "val" / "a.png", objects(8, 8))
    picture = root / "images" / "val" / "a.jpg"
    with pytest.raises(DataError, match="the map of objects is 8 x 8 pixels") as caught:
        instance_maps.read(instance_maps.beside(str(picture)), str(picture))
    assert "\n" not in str(caught.value)
    save(root / "instances" / "val" / "a.png", noise())
    with pytest.raises(DataError, match="one number per pixel"):
        instance_maps.read(instance_maps.beside(str(picture)), str(picture))


def test_without_a_folder_of_pictures_there_are_none(tmp_path):
    path = save(tmp_path / "some" / "a.jpg", noise())
    save(tmp_path / "instances" / "a.png", objects())
    assert instance_maps.beside(str(path)) is None
