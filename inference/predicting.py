"""`run.py predict`: cluster maps of any folder of pictures, at their own size and under their own names."""

import heapq
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

import config
from common import precision
from common.errors import ConfigError, DataError
from common.files import make_output, write_text
from common.names import shown
from datamodules.base import SegmentationDataModule, shapes
from datamodules.base.transforms import Geometry
from datamodules.files.reading import UnreadableError, WindowsOnlyError, header_size
from datamodules.folder import FolderSource, pictures_below
from engine import setup
from evaluation import readout
from evaluation.crf import as_bytes
from inference import asked, naming, windows
from inference.naming import Legend
from inference.objects import write_objects
from inference.overviews import Areas, Overview, overlays_page
from lightning_modules.base import UnsupervisedSegmenter
from reporting import panels, report

log = logging.getLogger(__name__)

BAND = 512
"""Rows of an overlay drawn at once."""
FINEST = 4
"""Times the usual pixels of a picture that is seen by windows without anyone having asked for them."""


def predict(
    checkpoint_path: Path, source: Path, output: Path, tokens: list[str], names: str | None = None
) -> dict[str, Any]:
    """Write `index/<name>.png` (cluster ids), `overlay/<name>.png`, overlays.html (all of these with the names of their
    classes), areas.csv, legend.png, overview.png and clusters.json into `output`.

    Ids are those of the probe (`predict.probe`), the same for every picture and every call. `names`: a names file
    (see inference/naming.py), `none`, or None for the one that `clusters` wrote for this checkpoint, where it is there.
    Of a method that finds objects also `instances/<name>.png` and instances.json, see `objects.write_objects`.
    areas.csv has a row a picture and two columns a name: pixels, and percent of the picture. Clusters of one name are
    one region in overlays, without a border between them. A picture that cannot be read is named and left out.
    Returns what clusters.json holds.
    """
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    cfg = config.restore(checkpoint["labelfree"]["config"], tokens)
    pictures = pictures_below(source, data=cfg.data)
    asked.expect_apart(source, output)
    model = setup.restore_model(checkpoint, cfg)
    probe = naming.choose_probe(cfg, model)
    legend = naming.legend_for(checkpoint_path, checkpoint, model, probe, names)
    model.to(setup.device(cfg))
    source_of = whole_pictures if cfg.predict.window is None else windowed_pictures
    make_output(output)
    areas, overview, done = Areas(legend), Overview(legend, len(pictures), cfg.predict.overlay_alpha), 0
    unreadable: dict[str, str] = {}
    for number, picture, ids in source_of(cfg, model, pictures, probe, unreadable):
        name = pictures.id(number)
        write(output, name, picture, ids, legend, cfg.predict.overlay_alpha)
        file = shown(Path(os.path.relpath(pictures.entries[number].picture, source.expanduser())).as_posix())
        overview.add(number, name, picture, ids, areas.add(name, file, ids))
        done += 1
        if 5 * (done - 1) // len(pictures) != 5 * done // len(pictures):
            log.info("%d of %d pictures", done, len(pictures))
    missed = len(pictures) - done
    if not done:
        first = next(iter(unreadable))
        raise DataError(f"input={source}: none of its {len(pictures)} pictures could be read; first: {first}")
    content = {
        "probe": probe,
        "checkpoint": checkpoint_path.name,
        "names_from_labels": legend.source is None and any(":" in name for name in legend.names),
        "names_file": None if legend.source is None else str(legend.source),
        "clusters": [
            {"id": i, "name": name, "colour": list(colour)}
            for i, (name, colour) in enumerate(zip(legend.names, legend.colours, strict=True))
        ],
        "pictures": done,
        "unreadable": sorted(unreadable),
    }
    classes = legend.classes()
    panels.legend_png(output / "legend.png", list(classes), [legend.colours[ids[0]] for ids in classes.values()])
    areas.save(output / "areas.csv")
    overview.save(output / "overview.png")
    page = overlays_page(source.resolve().name, legend, areas, probe, checkpoint_path)
    write_text(output / "overlays.html", page)
    if model.scores_instances:
        content["objects"] = write_objects(cfg, model, pictures, output)
    report.write_json(output / "clusters.json", content)
    unread = f", {missed} could not be read" if missed else ""
    log.info("%d pictures in %s%s; look at %s", done, output, unread, output / "overlays.html")
    return content


def whole_pictures(
    cfg: DictConfig, model: UnsupervisedSegmenter, pictures: FolderSource, probe: str, unreadable: dict[str, str]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(number, picture [H,W,3], ids [H,W]) of every picture that can be read, in turn; the others are named.

    Pictures are seen as a whole, but for those that are too large, or too long and thin: these by windows.
    """
    geometry = Geometry.whole(cfg)
    apart: dict[int, WindowsOnlyError] = {}
    for number, entry in enumerate(pictures.entries):
        try:
            shapes.expect_whole(entry.picture, header_size(entry.picture), geometry)
        except WindowsOnlyError as error:
            apart[number] = error
        except UnreadableError:
            pass  # named when it is read
    numbers = [number for number in range(len(pictures)) if number not in apart]
    parts = [odd_pictures(cfg, model, pictures, probe, unreadable, apart, geometry)]
    if numbers:
        parts.append(seen_whole(cfg, model, pictures, probe, unreadable, numbers, geometry))
    yield from heapq.merge(*parts, key=lambda found: found[0])


def odd_pictures(
    cfg: DictConfig,
    model: UnsupervisedSegmenter,
    pictures: FolderSource,
    probe: str,
    unreadable: dict[str, str],
    apart: dict[int, WindowsOnlyError],
    geometry: Geometry,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Those of `apart` (number -> why it is not seen as a whole) by windows of the usual size, each named.

    They keep their own scale up to `FINEST` times the usual pixels, so that none takes much longer than others.
    """
    size = geometry.size
    windowed = config.changed(cfg, {"predict.window": size})
    for number, error in apart.items():
        if model.crf is not None:
            log.warning("%s; it is skipped, because evaluation.crf=dense is for whole pictures", error)
            unreadable[error.file] = str(error)
            continue
        log.warning(
            "%s: %s; it is seen by windows of %d px (predict.window=%d: at its own scale)",
            shown(error.file), error.reason, size, size,
        )  # fmt: skip
        try:
            with any_size():
                picture, _ = pictures.read(number)
            ids = windowed_ids(reduced(picture, geometry), picture.shape[:2], scores_of(model, probe), model, windowed)
        except UnreadableError as found:
            log.warning("%s; it is skipped", found)
            unreadable[error.file] = str(found)
        except (MemoryError, torch.OutOfMemoryError):
            log.warning("%s: there is too little memory for it; it is skipped", shown(error.file))
            unreadable[error.file] = f"{shown(error.file)}: there is too little memory for it"
        else:
            yield number, picture, ids


def reduced(picture: np.ndarray, geometry: Geometry) -> np.ndarray:
    """A picture uint8 [H,W,3], made smaller where it has more than `FINEST` times the usual pixels."""
    height, width = picture.shape[:2]
    factor = math.sqrt(FINEST * geometry.size**2 / (height * width))
    if factor >= 1:
        return picture
    target = max(1, round(height * factor)), max(1, round(width * factor))
    return Geometry(target, "none", geometry.interpolation).resize(picture, None)[0]


def scores_of(model: UnsupervisedSegmenter, probe: str) -> Callable[[Tensor], Tensor]:
    """From pictures [B,3,h,w] to the scores [B,K,h/s,w/s] of a probe."""
    return lambda images: read(model, images)[1][probe]


def seen_whole(
    cfg: DictConfig,
    model: UnsupervisedSegmenter,
    pictures: FolderSource,
    probe: str,
    unreadable: dict[str, str],
    numbers: list[int],
    geometry: Geometry,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The pictures of these numbers."""
    rest = FolderSource(
        [pictures.entries[number] for number in numbers], value_range=pictures.value_range, channels=pictures.channels
    )
    reader = SegmentationDataModule(cfg)
    reader.pad_multiple = model.pad_multiple
    loader = reader.loader(rest, geometry=geometry, batch_size=1)
    unreadable |= loader.account.files
    for batch in loader:
        place = int(batch["index"][0])
        yield numbers[place], rest.read(place)[0], cluster_ids(model, batch, probe)
        unreadable |= loader.account.files
    unreadable |= loader.account.files


def windowed_pictures(
    cfg: DictConfig, model: UnsupervisedSegmenter, pictures: FolderSource, probe: str, unreadable: dict[str, str]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The same by windows of `predict.window` px, at the pictures' own scale, or scaled to `predict.size`."""
    if model.crf is not None:
        raise ConfigError(
            "evaluation.crf=dense: is for whole pictures; set predict.window=null, or evaluation.crf=none"
        )

    for number, entry in enumerate(pictures.entries):
        try:
            with any_size():
                picture = pictures.read(number)[0]
        except UnreadableError as error:
            log.warning("%s; it is skipped", error)
            unreadable[error.file] = str(error)
            continue
        seen = picture
        if cfg.predict.size is not None:
            geometry = Geometry(cfg.predict.size, "keep", cfg.data.interpolation)
            if shapes.is_long(geometry, *picture.shape[:2]):
                log.warning("%s: so long and thin that it is seen at its own scale", shown(entry.picture))
            else:
                seen, _ = geometry.resize(picture, None)
        ids = windowed_ids(seen, picture.shape[:2], scores_of(model, probe), model, cfg)
        yield number, picture, ids


def windowed_ids(
    seen: np.ndarray,
    size: tuple[int, int],
    scores_of: Callable[[Tensor], Tensor],
    model: UnsupervisedSegmenter,
    cfg: DictConfig,
    offset: tuple[int, int] = (0, 0),
) -> np.ndarray:
    """Ids [H,W] at `size` of a picture as the network sees it, uint8 [H',W',3]; `offset`: see `windows.blended`."""
    own, backbone = cfg.predict, model.backbone
    scores, padded = windows.blended(
        seen, scores_of, own.window, backbone.unit, own.overlap, offset, backbone.transformer, model.device
    )
    frame = tuple(round(side * own / small) for side, own, small in zip(padded, size, seen.shape, strict=False))
    return windows.bands(readout.strips(scores, frame), size, scores.shape[1])


@contextmanager
def any_size() -> Iterator[None]:
    """Pillow takes pictures of more than 180 million pixels for an attack; here they are the user's own."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@torch.inference_mode()
def read(model: UnsupervisedSegmenter, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """`UnsupervisedSegmenter.read` on its device, in the precision of the run."""
    dtype = precision.AUTOCAST[precision.usable(model.cfg.trainer.precision, model.device.type)]
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        return model.read(images.to(model.device))


@torch.inference_mode()
def cluster_ids(model: UnsupervisedSegmenter, batch: dict[str, Any], probe: str) -> np.ndarray:
    """Ids [H,W] of a batch of one picture, at the size of its file."""
    image = batch["image"].to(model.device)
    codes, scores = read(model, image)
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
        maps[window] = model.crf(as_bytes(image[:, :3][window]), [log_probs[window]])[0]
    return windows.bands(readout.strips(maps, frame), (height, width), maps.shape[1])


def write(output: Path, name: str, picture: np.ndarray, ids: np.ndarray, legend: Legend, alpha: float) -> None:
    """The index map and the overlay of one picture [H,W,3]; outlines run between names, not between clusters."""
    index, over = output / "index" / f"{name}.png", output / "overlay" / f"{name}.png"
    for path in (index, over):
        path.parent.mkdir(parents=True, exist_ok=True)
    panels.index_png(index, ids, legend.colours)
    regions, drawn = legend.joined()[ids], np.empty((*ids.shape, 3), np.uint8)
    for first in range(0, len(ids), BAND):  # a band at a time, with the row above it for the outlines
        above = max(0, first - 1)
        part = panels.overlay(picture[above : first + BAND], regions[above : first + BAND], legend.colours, alpha)
        drawn[first : first + BAND] = part[first - above :]
    Image.fromarray(drawn).save(over)
