"""`run.py clusters`: what each cluster of a checkpoint is, as page, picture and table, and a file to name it."""

import csv
import logging
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image, ImageDraw
from torch import Tensor

import config
from common import precision
from common.files import write_text
from datamodules.base import SegmentationDataModule
from datamodules.base.module import Source
from engine import setup
from inference import naming
from inference.naming import Legend
from lightning_modules.base import UnsupervisedSegmenter
from reporting import page, panels
from reporting.exemplars import DOUBTFUL, TYPICAL, ClusterSurvey, Exemplar, nearest_clusters

log = logging.getLogger(__name__)

TILE = 84
"""Side of a shown patch, px."""
FRAME = (255, 255, 255)


def clusters(checkpoint_path: Path, tokens: list[str]) -> Path:
    """Look at training pictures with a checkpoint; returns the folder `<run>/clusters/<checkpoint name>/`.

    It gets index.html, clusters.png, clusters.csv and names.yaml. A names.yaml that is there keeps its names where it
    belongs to the same centroids; otherwise it is put aside under the name of its own.
    """
    cfg, data, model, checkpoint = restore(checkpoint_path, tokens)
    probe = naming.choose_probe(cfg, model)
    values = naming.centroids(model, probe)
    folder = naming.folder_of(checkpoint_path, "clusters")
    folder.mkdir(parents=True, exist_ok=True)
    legend = kept_names(folder / "names.yaml", checkpoint, cfg, probe, values)
    survey = ClusterSurvey(len(values))
    for batch, codes, scores in read_out(cfg, data, model, probe):
        for row, name in enumerate(batch["id"]):
            survey.add(name, batch["image"][row], batch["valid"][row], scores[row], codes[row])
    near = nearest_clusters(values)
    write_text(folder / "clusters.csv", as_csv(legend, survey, near))
    sheet(legend, survey).save(folder / "clusters.png")
    title = f"Clusters of {cfg.method.name} on {cfg.data.name}"
    editor = naming.editor(folder / "names.yaml", legend, probe, values)
    write_text(folder / "index.html", as_page(title, checkpoint_path, probe, legend, survey, near, editor))
    log.info(
        "%d clusters, %d pictures: %s shows them, %s names them",
        len(values), survey.seen, folder / "index.html", folder / "names.yaml",
    )  # fmt: skip
    return folder


def restore(
    checkpoint_path: Path, tokens: list[str]
) -> tuple[DictConfig, SegmentationDataModule, UnsupervisedSegmenter, dict[str, Any]]:
    """Configuration, pictures, trained method (on its device) and content of a checkpoint."""
    setup.begin()
    checkpoint = setup.read_checkpoint(checkpoint_path)
    alone = {"trainer.accelerator": "auto", "trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
    stored = config.changed(config.restore(checkpoint["labelfree"]["config"]), alone)
    cfg, data = setup.build_data(config.restore(config.plain(stored), tokens))
    model = setup.restore_model(checkpoint, cfg)
    data.pad_multiple = model.pad_multiple
    return cfg, data, model.to(setup.device(cfg)), checkpoint


@torch.inference_mode()
def read_out(
    cfg: DictConfig,
    data: SegmentationDataModule,
    model: UnsupervisedSegmenter,
    probe: str,
    source: str | Source = "train",
):
    """Batches of pictures, seen as in evaluation, with codes [B,D,h,w] and scores [B,K,h,w] of a probe.

    `evaluation.kmeans.pictures` pictures at most, a keyed choice; source: the training pictures, or others.
    """
    limit = cfg.evaluation.kmeans.pictures
    loader = data.loader(source, geometry="eval", order="shuffled", limit=limit, purpose="clusters")
    dtype = precision.AUTOCAST[precision.usable(cfg.trainer.precision, model.device.type)]
    total, done = min(limit, len(loader.dataset)), 0
    for batch in loader:
        with torch.autocast(model.device.type, dtype=dtype, enabled=dtype is not None):
            codes, scores = model.read(batch["image"].to(model.device))
        yield batch, codes, scores[probe]
        before, done = done, done + len(batch["id"])
        if 5 * before // total != 5 * done // total:
            log.info("%d of %d pictures", done, total)


def kept_names(path: Path, checkpoint: dict[str, Any], cfg: DictConfig, probe: str, values: Tensor) -> Legend:
    """The names in the file of this checkpoint; where there is none for these centroids, a new file is written."""
    if path.is_file():
        content = naming.load(path)
        if (content["probe"], str(content["centroids"])) == (probe, naming.mark(values)):
            return naming.read(path, probe, values)
        aside = path.with_name(f"names.{content['centroids']}.yaml")
        path.replace(aside)
        log.warning("the names in %s were those of other clusters; they are kept as %s", path, aside.name)
    legend = naming.of_labels(checkpoint, cfg, probe)
    naming.write(path, legend, probe, values)
    return naming.read(path, probe, values)


def as_csv(legend: Legend, survey: ClusterSurvey, near: list[list[tuple[int, float]]]) -> str:
    """A row a cluster: id, name, colour, percent of the patches, pictures, mean cosine, ids of the nearest clusters."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["id", "name", "colour", "share", "pictures", "confidence", "nearest"])
    for number, (share, cosine) in enumerate(zip(survey.shares(), survey.mean_cosines(), strict=True)):
        writer.writerow([
            number, legend.names[number], page.hexadecimal(legend.colours[number]), f"{share:.3f}",
            int(survey.pictures[number]), "" if np.isnan(cosine) else f"{100 * cosine:.2f}",
            " ".join(str(other) for other, _ in near[number]),
        ])  # fmt: skip
    return buffer.getvalue()


def tile(found: Exemplar) -> Image.Image:
    """A patch with its surroundings, the patch outlined."""
    image = Image.fromarray(found.crop)
    scale = TILE / image.width
    image = image.resize((TILE, TILE), Image.Resampling.BICUBIC)
    box = [round(side * scale) for side in found.box]
    draw = ImageDraw.Draw(image)
    draw.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=(0, 0, 0))
    draw.rectangle(box, outline=FRAME)
    return image


def sheet(legend: Legend, survey: ClusterSurvey) -> Image.Image:
    """The contact sheet: a row a cluster with colour, name, share, typical patches, and doubtful ones to the right."""
    left, gap, text, bold = 210, 6, panels.font(13), panels.font(14, bold=True)
    start = left + TYPICAL * (TILE + gap) + 24
    width = start + DOUBTFUL * (TILE + gap) + gap
    image = Image.new("RGB", (width, 40 + survey.clusters * (TILE + gap) + gap), panels.PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((left, 12), "most typical", fill=panels.INK, font=bold)
    draw.text((start, 12), "most doubtful", fill=panels.INK, font=bold)
    for number, share in enumerate(survey.shares()):
        top = 40 + number * (TILE + gap)
        draw.rectangle((gap, top, gap + 22, top + TILE - 1), fill=legend.colours[number])
        draw.text((36, top + 14), shortened(legend.names[number], left - 42, bold), fill=panels.INK, font=bold)
        draw.text((36, top + 38), f"id {number}, {share:.1f} % of patches", fill=panels.FAINT, font=text)
        for kind, x in (("typical", left), ("doubtful", start)):
            for place, found in enumerate(survey.exemplars(kind, number)):
                image.paste(tile(found), (x + place * (TILE + gap), top))
    return image


def shortened(name: str, width: int, font: Any) -> str:
    """A name cut to `width` pixels."""
    while name and font.getlength(name) > width:
        name = name[:-2] + "…"
    return name


def as_page(
    title: str,
    checkpoint: Path,
    probe: str,
    legend: Legend,
    survey: ClusterSurvey,
    near: list[list[tuple[int, float]]],
    editor: dict[str, Any],
) -> str:
    """The page: a table of all clusters, a form for their names (`editor`), then their patches."""
    confidence = survey.mean_cosines()
    heads = [page.numeric("id"), "cluster", page.numeric("% of patches"), page.numeric("pictures"),
             page.numeric("confidence"), "nearest (cosine)"]  # fmt: skip
    rows, clusters = [], []
    for number, share in enumerate(survey.shares()):
        cosine = None if np.isnan(confidence[number]) else 100 * float(confidence[number])
        cluster = {
            "id": number,
            "name": legend.names[number],
            "colour": page.hexadecimal(legend.colours[number]),
            "share": float(share),
            "pictures": int(survey.pictures[number]),
            "nearest": [(legend.names[other], value) for other, value in near[number]],
            "empty": not survey.patches[number],
            "scenes": [(page.picture(found.image, found.picture), found) for found in survey.scenes(number)],
            "typical": [(patch(found, "typical"), found) for found in survey.exemplars("typical", number)],
            "doubtful": [
                (patch(found, "doubtful"), found, legend.names[found.other])
                for found in survey.exemplars("doubtful", number)
            ],
        }
        clusters.append(cluster)
        rows.append((page.number(number, 0), cluster, page.number(float(share)),
                     page.number(cluster["pictures"], 0), page.number(cosine)))  # fmt: skip
    return page.render(
        "clusters.html.j2", title=title, checkpoint=checkpoint, probe=probe, seen=survey.seen, clusters=clusters,
        table=page.Table(heads, rows, "clusters"), **editor,
    )  # fmt: skip


def patch(found: Exemplar, kind: str) -> page.Picture:
    """A patch on the page."""
    return page.picture(tile(found), f"{kind} patch of {found.picture}", TILE)
