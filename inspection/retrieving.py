"""`run.py retrieve`: segments of a picture and the nearest segments of a data set, as a picture and as a page.

Every picture is cut into segments by spherical k-means on its codes (`evaluation.retrieval.*`: grid, rounds, location);
a segment is compared by its prototype. No label is read. Sources: SegSort (ICCV 2019) section 3.4; HSG (CVPR
2022), contextual retrieval.
"""

import logging
from dataclasses import dataclass
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
from common.names import of_results
from common.spec import channels_of
from datamodules.base import shapes
from datamodules.base.listed import Entry
from datamodules.base.transforms import Geometry
from datamodules.files import ranges
from datamodules.files.reading import is_picture
from datamodules.folder import FolderSource, expect_apart
from engine import setup
from evaluation.readout import upsample_ids
from evaluation.retrieval import SegmentRetrieval
from grouping.segments import prototypes
from inference.asked import expect_picture
from lightning_modules.base import UnsupervisedSegmenter
from reporting import page, panels
from retrieval import search

log = logging.getLogger(__name__)

CELL = 160
"""Width of a picture in the gallery, px."""


@dataclass
class Pictures:
    """Segments of some pictures."""

    images: list[np.ndarray]
    """uint8 [H,W,3] as the network saw them."""
    maps: list[np.ndarray]
    """int64 [H,W], segment of each pixel, 0.. in each picture; -1 on padding."""
    names: list[str]
    vectors: Tensor
    """float32 [S,D], unit length, of all pictures in turn."""
    owner: Tensor
    """int64 [S], the picture of each row."""
    number: Tensor
    """int64 [S], its id in the map of that picture."""


def retrieve(checkpoint_path: Path, image: Path, k: int, output: Path | None, tokens: list[str]) -> dict[str, Any]:
    """Write gallery.png and gallery.html into `output` (default: `retrieve/<picture>/` in the run folder).

    A row a segment of `image`, the largest first: the segment, then its `k` nearest segments of the training pictures,
    at most one of each picture, with cosine and picture. Returns, for each segment, its pixels and what was found.

    Raises:
        ConfigError: k is below 1.
        DataError: the picture cannot be read.
    """
    if k < 1:
        raise ConfigError(f"k={k}: must be at least 1")
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    cfg = config.restore(checkpoint["labelfree"]["config"], tokens)
    source = one_picture(image)
    cfg, data = setup.build_data(cfg)
    expect_apart(cfg, output=output)
    source.read_with(ranges.kept(cfg.data), channels_of(cfg.data))
    model = setup.restore_model(checkpoint, cfg)
    device = torch.device("cuda" if torch.cuda.is_available() and cfg.trainer.accelerator != "cpu" else "cpu")
    model.to(device)
    data.pad_multiple = model.pad_multiple
    size = cfg.predict.size or cfg.data.eval_size
    geometry = Geometry(
        size=size if isinstance(size, int) else min(size), crop="keep", interpolation=cfg.data.interpolation
    )
    shapes.expect_whole(image, source.size(0), geometry)
    sorter = SegmentRetrieval(cfg.evaluation.retrieval, 1)
    limit = cfg.evaluation.retrieval.pictures
    bank = collect(model, sorter, data.loader("train", geometry="eval", order="shuffled", limit=limit), device)
    query = collect(model, sorter, data.loader(source, geometry=geometry, batch_size=1), device)
    if not query.images:
        raise DataError(f"image={image}: cannot be read as a picture")
    scores, rows = search.nearest(query.vectors, bank.vectors, min(len(bank.vectors), 64 * k))
    areas = np.bincount(query.maps[0][query.maps[0] >= 0], minlength=len(query.vectors))
    found = []
    for number in np.argsort(-areas, kind="stable").tolist():
        seen: dict[int, tuple[float, int]] = {}
        for score, row in zip(scores[number].tolist(), rows[number].tolist(), strict=True):
            if len(seen) < k:
                seen.setdefault(int(bank.owner[row]), (score, row))
        found.append({"segment": number, "pixels": int(areas[number]), "nearest": list(seen.values())})
    run = checkpoint_path.resolve().parent
    folder = output or (run.parent if run.name == "checkpoints" else run) / "retrieve" / of_results([image.name])[0]
    make_output(folder)
    write(folder, cfg, image.name, query, bank, found)
    log.info("%d segments of %s among %d of %d pictures: %s", len(found), image.name, len(bank.vectors),
             len(bank.images), folder / "gallery.html")  # fmt: skip
    return {"segments": found, "pictures": [bank.names[int(bank.owner[row])] for row in range(len(bank.vectors))]}


def one_picture(path: Path) -> FolderSource:
    """A source of one picture, without label. Raises DataError where the file is none."""
    expect_picture(path)
    if not is_picture(path.name):
        raise DataError(f"image={path}: is no picture by its name; name a jpg or png file")
    return FolderSource([Entry(path.stem, str(path))])


@torch.inference_mode()
def collect(model: UnsupervisedSegmenter, sorter: SegmentRetrieval, loader: Any, device: torch.device) -> Pictures:
    """The segments of all pictures of a loader."""
    dtype = precision.AUTOCAST[precision.usable(model.cfg.trainer.precision, device.type)]
    found = Pictures([], [], [], torch.empty(0, model.code_dim), *(torch.empty(0, dtype=torch.long) for _ in "ab"))
    vectors, owner, number = [], [], []
    for batch in loader:
        image, valid = batch["image"].to(device), batch["valid"].to(device)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            codes = model.seen(image)["codes"]
        unit, ids, count, size = sorter.segments(codes, valid)
        vectors.append(prototypes(unit, ids, count).cpu())
        maps = upsample_ids(ids.view(len(codes), *size), tuple(valid.shape[-2:])).where(valid, -1).cpu()
        for row, name in enumerate(batch["id"]):
            rows, columns = int(valid[row].any(1).sum()), int(valid[row].any(0).sum())
            own = ids.view(len(codes), -1)[row]
            first = int(own[own >= 0].min()) if bool((own >= 0).any()) else 0
            parts = int(own.max()) + 1 - first
            window = maps[row, :rows, :columns]
            found.maps.append(torch.where(window >= 0, window - first, -1).numpy())
            found.images.append(panels.as_picture(batch["image"][row, :, :rows, :columns]))
            owner += [len(found.names)] * parts
            number += range(parts)
            found.names.append(name)
    if vectors:
        found.vectors, found.owner, found.number = torch.cat(vectors), torch.tensor(owner), torch.tensor(number)
    return found


def shown(pictures: Pictures, row: int) -> Image.Image:
    """A picture with all but one segment dimmed, outlined, at the width of a cell."""
    owner, number = int(pictures.owner[row]), int(pictures.number[row])
    inside = pictures.maps[owner] == number
    picture = pictures.images[owner].astype(np.float32)
    dimmed = np.where(inside[..., None], picture, 0.25 * picture + 0.6 * 255)
    edge = np.zeros_like(inside)
    edge[:, 1:] |= inside[:, 1:] != inside[:, :-1]
    edge[1:] |= inside[1:] != inside[:-1]
    dimmed[edge] = (230, 40, 40)
    image = Image.fromarray(dimmed.astype(np.uint8))
    return image.resize((CELL, max(1, round(image.height * CELL / image.width))), Image.Resampling.BICUBIC)


def write(
    folder: Path, cfg: DictConfig, name: str, query: Pictures, bank: Pictures, found: list[dict[str, Any]]
) -> None:
    """gallery.png (a sheet) and gallery.html (the same with cosines and names, in one file)."""
    lines = []
    for entry in found:
        cells = [(shown(query, entry["segment"]), f"{entry['pixels']} px")]
        for score, row in entry["nearest"]:
            cells.append((shown(bank, row), f"{score:.3f} {bank.names[int(bank.owner[row])]}"))
        lines.append(cells)
    gap = panels.GAP
    heights = [max(image.height for image, _ in cells) for cells in lines]
    width = max(len(cells) for cells in lines) * (CELL + gap) + gap
    sheet = Image.new("RGB", (width, sum(heights) + gap * (len(lines) + 1)), panels.PAPER)
    y = gap
    for cells, height in zip(lines, heights, strict=True):
        for place, (image, _) in enumerate(cells):
            sheet.paste(image, (gap + place * (CELL + gap) + (gap if place else 0), y))
        y += height + gap
    sheet.save(folder / "gallery.png")
    rows = [[(page.picture(image, text), text) for image, text in cells] for cells in lines]
    shows = {"picture": name, "data": cfg.data.name, "method": cfg.method.name, "rows": rows}
    write_text(folder / "gallery.html", page.render("retrieve.html.j2", **shows))
