"""`run.py predict`: cluster maps of any folder of pictures, at their own size and under their own names."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

import config
from common import precision
from common.errors import CheckpointError, ConfigError, DataError
from common.palette import default_palette
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from datamodules.folder import pictures_below
from datamodules.reading import read_picture
from datamodules.transforms import Geometry
from engine import setup
from evaluation import panels, readout, report
from evaluation.crf import as_bytes
from lightning_modules.base import UnsupervisedSegmenter

log = logging.getLogger(__name__)


def predict(checkpoint_path: Path, source: Path, output: Path, tokens: list[str]) -> dict[str, Any]:
    """Write `index/<name>.png` (cluster ids), `overlay/<name>.png`, legend.png and clusters.json into `output`.

    Ids are those of the probe (`predict.probe`), the same for every picture and every call. A picture that cannot be
    read is named and left out. Returns what clusters.json holds.
    """
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    cfg = config.restore(checkpoint["labelfree"]["config"], tokens)
    pictures = pictures_below(source)
    if source.resolve() in (output.resolve(), *output.resolve().parents):
        raise ConfigError(f"output={output}: lies in the input folder and would be read as pictures; name another")
    model = setup.restore_model(checkpoint, cfg)
    probe = choose_probe(cfg, model)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    model.to(device)
    names, colours = legend(cfg, checkpoint["labelfree"].get("clusters", {}).get(probe), setup.stored_meta(checkpoint))
    size = cfg.predict.size or cfg.data.eval_size
    geometry = Geometry(
        size=size if isinstance(size, int) else min(size), crop="keep", interpolation=cfg.data.interpolation
    )
    reader = SegmentationDataModule(cfg)
    reader.pad_multiple = model.backbone.patch_multiple
    loader = reader.loader(pictures, geometry=geometry, batch_size=1)
    done = 0
    for batch in loader:
        ids = cluster_ids(model, batch, probe, device)
        write(
            output,
            batch["id"][0],
            pictures.entries[int(batch["index"][0])].picture,
            ids,
            colours,
            cfg.predict.overlay_alpha,
        )
        done += 1
        if done % max(1, len(pictures) // 10) == 0:
            log.info("%d of %d pictures", done, len(pictures))
    missed = len(pictures) - done
    if not done:
        first = next(iter(loader.account.files))
        raise DataError(f"input={source}: none of its {len(pictures)} pictures could be read; first: {first}")
    content = {
        "probe": probe,
        "checkpoint": checkpoint_path.name,
        "names_from_labels": any(":" in name for name in names),
        "clusters": [
            {"id": i, "name": name, "colour": list(colour)}
            for i, (name, colour) in enumerate(zip(names, colours, strict=True))
        ],
        "pictures": done,
        "unreadable": sorted(loader.account.files),
    }
    panels.legend_png(output / "legend.png", names, colours)
    report.write_json(output / "clusters.json", content)
    log.info("%d pictures in %s%s", done, output, f", {missed} could not be read" if missed else "")
    return content


def choose_probe(cfg: DictConfig, model: UnsupervisedSegmenter) -> str:
    """`predict.probe`, with `auto` resolved. Raises CheckpointError for k-means before its centroids were fitted."""
    fitted = bool(model.kmeans_probe.fitted)
    if cfg.predict.probe == "auto":
        return "kmeans" if fitted else "cluster"
    if cfg.predict.probe == "kmeans" and not fitted:
        raise CheckpointError(
            "predict.probe=kmeans: the centroids are fitted when a run ends, and this checkpoint was written before; "
            "use last.ckpt of a finished run, or predict.probe=cluster"
        )
    return cfg.predict.probe


def legend(cfg: DictConfig, mapping: list[int] | None, meta: ClassMeta) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours of the clusters: those of the matched classes where the run had labels (`3: road`)."""
    clusters = cfg.method.num_clusters
    if mapping is None or not meta.has_labels:
        return [f"cluster {i}" for i in range(clusters)], [tuple(colour) for colour in default_palette(clusters)]
    colours = panels.cluster_colours(meta, mapping, clusters)
    names = [f"{i}: {meta.names[target]}" if target >= 0 else f"cluster {i}" for i, target in enumerate(mapping)]
    return names, [tuple(int(part) for part in colour) for colour in colours]


@torch.inference_mode()
def cluster_ids(model: UnsupervisedSegmenter, batch: dict[str, Any], probe: str, device: torch.device) -> np.ndarray:
    """Ids [H,W] at the size of the picture file."""
    image = batch["image"].to(device)
    dtype = precision.AUTOCAST[precision.usable(model.cfg.trainer.precision, device.type)]
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        codes, scores = model.read(image)
    valid = batch["valid"][0]
    rows, columns = int(valid.any(1).sum()), int(valid.any(0).sum())
    height, width = batch["size"][0].tolist()
    # The padded frame, scaled so that the picture in its corner has its own size again.
    frame = (round(image.shape[2] * height / rows), round(image.shape[3] * width / columns))
    maps = scores[probe]
    if model.crf is not None:  # at the size that the network sees, then enlarged
        log_probs = model.log_probs(codes, {probe: maps}, tuple(image.shape[-2:]))[probe]
        maps = log_probs.exp()
        window = (slice(None), slice(None), slice(0, rows), slice(0, columns))
        maps[window] = model.crf(as_bytes(image[window]), [log_probs[window]])[0]
    return readout.predict(maps, frame)[0, :height, :width].cpu().numpy()


def write(
    output: Path, name: str, file: str, ids: np.ndarray, colours: list[tuple[int, int, int]], alpha: float
) -> None:
    """The index map and the overlay of one picture."""
    index, over = output / "index" / f"{name}.png", output / "overlay" / f"{name}.png"
    for path in (index, over):
        path.parent.mkdir(parents=True, exist_ok=True)
    panels.index_png(index, ids, colours)
    panels.Image.fromarray(panels.overlay(read_picture(file), ids, colours, alpha)).save(over)
