"""`run.py explain`: why a patch of a picture is in its cluster, and what it is held together with."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from common import precision
from common.errors import ConfigError
from common.files import make_output, write_text
from common.names import of_results
from common.spec import channels_of
from datamodules.base import SegmentationDataModule, shapes
from datamodules.base.transforms import Geometry
from datamodules.files import ranges
from datamodules.folder import expect_apart
from inference import naming
from inference.naming import Legend
from inspection import asked, explanation
from inspection.clusters import restore
from inspection.explanation import View
from inspection.retrieving import one_picture
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.relations import Place, Relation, Seen, cell
from reporting import embedding, report
from reporting.figures import Spot

log = logging.getLogger(__name__)

ALPHA = 2.0
"""Probabilities are softmax(ALPHA * cosine), as the dense CRF gets them."""


def explain(
    checkpoint_path: Path, image: Path, point: str, output: Path | None, tokens: list[str], names: str | None = None
) -> dict[str, Any]:
    """Write index.html, explain.json and a png for each figure into `output` (default:
    `explain/<checkpoint>/<picture>-<x>-<y>/` in the run folder). Returns what explain.json holds.

    point: `x,y`, px of the picture as it is in its file (upright), from the top left. names: as for `predict`.

    Raises:
        ConfigError: the point has another form or lies outside; UMAP is asked for and not installed.
        DataError: the picture cannot be read.
    """
    where, source = asked.parse_point(point), one_picture(image)
    cfg, data, model, checkpoint = restore(checkpoint_path, tokens)
    expect_apart(cfg, output=output)
    source.read_with(ranges.kept(cfg.data), channels_of(cfg.data))
    height, width = source.read(0)[0].shape[:2]
    expect_inside(where, image, height, width)
    how = embedding.choose(cfg.explain.embedding)
    probe = naming.choose_probe(cfg, model)
    legend = naming.legend_for(checkpoint_path, checkpoint, model, probe, names)
    view, *others = look(cfg, data, model, source, probe)
    rows, columns = view.seen.size
    seen_point = (where[0] + 0.5) * columns / width, (where[1] + 0.5) * rows / height
    frame = tuple(view.seen.image.shape[-2:])
    place = seen_point[1] / frame[0], seen_point[0] / frame[1]
    spot = Spot((seen_point[0] - 0.5, seen_point[1] - 0.5), frame)
    folder = (
        output or naming.folder_of(checkpoint_path, "explain") / f"{of_results([image.name])[0]}-{where[0]}-{where[1]}"
    )
    make_output(folder)
    content = {
        "picture": str(image), "point": list(where), "checkpoint": str(checkpoint_path), "method": cfg.method.name,
        "probe": probe, **facts(view, place, legend, cfg.explain.clusters),
    }  # fmt: skip
    views = [view, *others]
    sections = [
        explanation.labels(folder, view, spot, legend),
        explanation.similar(folder, view, spot, place),
        explanation.attention(folder, model, view, spot, place),
        *(explanation.relation(folder, found, views, spot) for found in related(model, views, place)),
        explanation.codes(folder, views, place, legend, how, cfg.explain.points, cfg.seed),
    ]
    report.write_json(folder / "explain.json", content)
    write_text(folder / "index.html", explanation.page_of(folder, content, cfg, len(others), sections))
    log.info("%s: %s shows why", content["clusters"][0]["name"], folder / "index.html")
    return content


def expect_inside(point: tuple[int, int], image: Path, height: int, width: int) -> None:
    """Raises ConfigError for a point outside a picture of this size."""
    if not (0 <= point[0] < width and 0 <= point[1] < height):
        raise ConfigError(
            f"point={point[0]},{point[1]}: lies outside {image.name} ({width} x {height} px); x must be 0 to "
            f"{width - 1}, y 0 to {height - 1}"
        )


def look(
    cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter, source: Any, probe: str
) -> Iterator[View]:
    """The picture, then up to `explain.pictures` others of the training set (a keyed choice), all seen as a whole."""
    size = cfg.predict.size or cfg.data.eval_size
    size = size if isinstance(size, int) else min(size)
    geometry = Geometry(size=size, crop="keep", interpolation=cfg.data.interpolation)
    shapes.expect_whole(source.entries[0].picture, source.size(0), geometry)
    own = next(iter(data.loader(source, geometry=geometry, batch_size=1)))
    yield read(model, own, probe)
    left = cfg.explain.pictures
    if not left:
        return
    drawn = data.loader(
        "train", geometry=geometry, order="shuffled", limit=left + 1, purpose="explain", batch_size=1
    )  # one more: the picture itself may be among them
    for batch in drawn:
        if left and not torch.equal(batch["image"], own["image"]):
            left -= 1
            yield read(model, batch, probe)


@torch.inference_mode()
def read(model: UnsupervisedSegmenter, batch: dict[str, Any], probe: str) -> View:
    """A batch of one picture, in the precision of the run."""
    image, valid = batch["image"].to(model.device), batch["valid"][0]
    dtype = precision.AUTOCAST[precision.usable(model.cfg.trainer.precision, model.device.type)]
    with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
        features = model.features(image)
        codes, scores = model.read(image, None if model.window else features)
    size = int(valid.any(1).sum()), int(valid.any(0).sum())
    return View(Seen(batch["id"][0], image[0], size, features, codes.float()), scores[probe].float())


def facts(view: View, place: Place, legend: Legend, count: int) -> dict[str, Any]:
    """The patch and its most probable clusters: cosine to their centroids, and probability (see ALPHA)."""
    grid = tuple(view.scores.shape[-2:])
    row, column = cell(place, grid)
    cosines = view.cosines[:, row, column]
    probabilities = (ALPHA * cosines).softmax(0)
    best = cosines.topk(min(count, len(cosines)))
    ahead = cosines.topk(min(2, len(cosines))).values
    return {
        "patch": [row, column],
        "grid": list(grid),
        "confidence": float(best.values[0]),
        "lead": float(ahead[0] - ahead[-1]),
        "clusters": [
            {"id": i, "name": legend.names[i], "colour": list(legend.colours[i]), "cosine": cosine,
             "probability": float(probabilities[i])}
            for i, cosine in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ],
    }  # fmt: skip


@torch.no_grad()
def related(model: UnsupervisedSegmenter, views: list[View], place: Place) -> list[Relation]:
    """What the method itself says, see `UnsupervisedSegmenter.relations`."""
    return model.relations([view.seen for view in views], place)
