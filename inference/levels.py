"""`run.py predict … levels=all`: the hierarchy of any pictures, a map and an overlay for every level."""

import logging
from pathlib import Path

import torch

import config
from common import precision
from common.errors import ConfigError
from common.files import make_output
from common.palette import default_palette
from datamodules.base import SegmentationDataModule
from datamodules.base.transforms import Geometry
from datamodules.folder import pictures_below
from engine import setup
from evaluation.readout import upsample_ids
from reporting import panels

log = logging.getLogger(__name__)


def predict_levels(checkpoint_path: Path, source: Path, output: Path, tokens: list[str]) -> list[str]:
    """Write `levels/<level>/<name>.png` (ids of groups, 16 bit) and `levels/<level>_overlay/<name>.png` into `output`,
    at the size of the picture files; returns the levels, the finest first.

    Ids are those of groups inside one picture and mean nothing beyond it. Raises ConfigError for a method that learns
    no hierarchy.
    """
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    cfg = config.restore(checkpoint["labelfree"]["config"], tokens)
    model = setup.restore_model(checkpoint, cfg)
    if "hierarchy" not in model.further:
        raise ConfigError(f"levels=all: method={cfg.method.name} as it was trained has no levels; leave levels out")
    names = model.further["hierarchy"].groups
    make_output(output)
    pictures = pictures_below(source, data=cfg.data)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    model.to(device)
    size = cfg.predict.size or cfg.data.eval_size
    geometry = Geometry(
        size=size if isinstance(size, int) else min(size), crop="keep", interpolation=cfg.data.interpolation
    )
    reader = SegmentationDataModule(cfg)
    reader.pad_multiple = model.pad_multiple
    dtype = precision.AUTOCAST[precision.usable(cfg.trainer.precision, device.type)]
    for batch in reader.loader(pictures, geometry=geometry, batch_size=1):
        image, valid = batch["image"].to(device), batch["valid"].to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            maps = model.levels(image, valid)
        rows, columns = int(valid[0].any(1).sum()), int(valid[0].any(0).sum())
        height, width = batch["size"][0].tolist()
        frame = (round(image.shape[2] * height / rows), round(image.shape[3] * width / columns))
        picture = pictures.read(int(batch["index"][0]))[0]
        for name, level in zip(names, maps, strict=True):
            ids = upsample_ids(level, frame)[0, :height, :width].clamp(min=0).cpu().numpy()
            colours = default_palette(int(ids.max()) + 1)
            index, over = (output / "levels" / folder / f"{batch['id'][0]}.png" for folder in (name, f"{name}_overlay"))
            for path in (index, over):
                path.parent.mkdir(parents=True, exist_ok=True)
            panels.index_png(index, ids, colours)
            panels.Image.fromarray(panels.overlay(picture, ids, colours, cfg.predict.overlay_alpha)).save(over)
    log.info("levels %s of %d pictures in %s", ", ".join(names), len(pictures), output / "levels")
    return list(names)
