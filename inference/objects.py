"""Objects of predicted pictures one by one, of a method that finds any: id maps, and one file in COCO's format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from pycocotools import mask as coco_masks
from torch import Tensor
from torch.nn import functional as F

from common import precision
from common.files import write_text
from datamodules.base import SegmentationDataModule
from datamodules.base.transforms import Geometry
from datamodules.folder import FolderSource
from evaluation.instances import Detections
from lightning_modules.base import UnsupervisedSegmenter

CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
"""The one category: which class an object has is said by the index maps."""


def write_objects(cfg: DictConfig, model: UnsupervisedSegmenter, pictures: FolderSource, output: Path) -> int:
    """Write `instances/<name>.png` and `instances.json` into `output`; how many objects the file has.

    A png has the picture's size: 0 is nothing, 1 the surest object, and so on, of those with a score of `model.sure`
    and more; grey, 8 bit, or 16 where there are more than 255. The json has every object with its score, box and mask
    (run-length code), images and one category. Pictures that cannot be read, or not be seen as a whole, are left out.
    """
    reader = SegmentationDataModule(cfg)
    reader.pad_multiple = model.pad_multiple
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for batch in reader.loader(pictures, geometry=Geometry.whole(cfg), batch_size=1):
        place, name = int(batch["index"][0]), batch["id"][0]
        found = at_file_size(detected(model, batch), batch)
        height, width = found.masks.shape[1:]
        path = output / "instances" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        sure = found.scores >= model.sure
        ids = Detections(found.masks[sure], found.boxes[sure], found.scores[sure]).id_map().numpy()
        Image.fromarray(ids.astype(np.uint8 if ids.max(initial=0) < 256 else np.uint16)).save(path)
        file = Path(pictures.entries[place].picture).name
        images.append({"id": place + 1, "file_name": file, "height": height, "width": width})
        annotations += [
            {"id": len(annotations) + row + 1, "image_id": place + 1, **annotation(found, row)}
            for row in range(len(found.scores))
        ]
    content = {"images": images, "annotations": annotations, "categories": [CATEGORY]}
    write_text(output / "instances.json", json.dumps(content))
    return len(annotations)


@torch.inference_mode()
def detected(model: UnsupervisedSegmenter, batch: dict[str, Any]) -> Detections:
    """The objects of a batch of one picture, on the CPU, in px of what the network saw."""
    dtype = precision.AUTOCAST[precision.usable(model.cfg.trainer.precision, model.device.type)]
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        (found,) = model.detections(batch["image"].to(model.device), batch["valid"].to(model.device))
    return Detections(found.masks.cpu(), found.boxes.float().cpu(), found.scores.float().cpu())


def at_file_size(found: Detections, batch: dict[str, Any]) -> Detections:
    """Objects of a padded picture, at the size of its file."""
    valid = batch["valid"][0]
    rows, columns = int(valid.any(1).sum()), int(valid.any(0).sum())
    height, width = batch["size"][0].tolist()
    masks: Tensor = found.masks[:, :rows, :columns]
    if len(masks):
        masks = F.interpolate(masks[:, None].float(), (height, width), mode="nearest-exact")[:, 0] > 0.5
    else:
        masks = masks.new_zeros(0, height, width)
    scale = torch.tensor([width / columns, height / rows] * 2)
    return Detections(masks, found.boxes * scale, found.scores)


def annotation(found: Detections, row: int) -> dict[str, Any]:
    """One object as COCO writes it."""
    code = coco_masks.encode(np.asfortranarray(found.masks[row].numpy().astype(np.uint8)))
    left, top, right, bottom = found.boxes[row].tolist()
    return {
        "category_id": CATEGORY["id"],
        "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
        "area": int(found.masks[row].sum()),
        "segmentation": {"size": list(found.masks.shape[1:]), "counts": code["counts"].decode()},
        "iscrowd": 0,
        "score": round(float(found.scores[row]), 4),
    }
