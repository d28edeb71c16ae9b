"""The same pictures under every entry of a comparison, whole, read out anew from the checkpoints of its runs."""

import logging

import numpy as np
import torch
from PIL import Image

import config
from common.errors import LabelfreeError
from common.spec import IGNORE, ClassMeta
from datamodules.base.transforms import Geometry
from engine import setup
from engine.fitting import Chosen
from evaluation import readout
from evaluation.probes import clusters_of
from reporting import page, panels
from reporting.comparison import Entry, Section
from reporting.comparison_page import Gallery
from reporting.page import Picture

log = logging.getLogger(__name__)

WIDTH = 220
"""Width of a shown picture, px."""


def gallery(section: Section, count: int = 4) -> Gallery:
    """Evenly spaced evaluated pictures, with truth, and the clusters of the first run of every entry.

    Clusters have the colours of the classes that the labels matched them to; without labels those of their ids.
    An entry whose checkpoint cannot be used is left out and named.
    """
    rows: dict[str, list[Picture]] = {}
    missing, meta = [], ClassMeta()
    for entry in section.entries:
        try:
            images, truth, maps, meta, probe = read_out(entry, count)
        except LabelfreeError as error:
            missing.append(f"No pictures of {entry.label}: {error}")
            continue
        if not rows:
            rows["picture"] = [shown(image, "picture") for image in images]
            if meta.has_labels:
                rows["truth"] = [shown(image, "truth", True) for image in truth]
        rows[f"{entry.label}: {probe}, seed {entry.first.metrics['seed']}"] = [
            shown(image, entry.label, True) for image in maps
        ]
    if not rows or not meta.has_labels:
        return Gallery(rows, missing=missing)
    names, colours = [*meta.names, "no label"], [*panels.class_colours(meta).tolist(), panels.VOID]
    return Gallery(rows, page.legend(names, colours), missing)


def shown(image: np.ndarray, what: str, lossless: bool = False) -> Picture:
    """A picture of a common width."""
    height = max(1, round(image.shape[0] * WIDTH / image.shape[1]))
    how = Image.Resampling.NEAREST if lossless else Image.Resampling.BICUBIC
    return page.picture(Image.fromarray(image).resize((WIDTH, height), how), what, lossless=lossless)


@torch.inference_mode()
def read_out(entry: Entry, count: int) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], ClassMeta, str]:
    """Pictures, truth and clusters of `count` evaluated pictures as colours, uint8 [H,W,3] each; the classes, and the
    probe that the clusters are of."""
    checkpoint = setup.read_checkpoint(entry.first.read_from)
    alone = {"trainer.accelerator": "auto", "trainer.devices": 1, "trainer.num_nodes": 1, "trainer.strategy": "auto"}
    cfg, data = setup.build_data(
        config.changed(config.restore(checkpoint["labelfree"]["config"], entry.first.words), alone)
    )
    model = setup.restore_model(checkpoint, cfg).to(setup.device(cfg))
    data.pad_multiple = model.pad_multiple
    source = data.source("val")
    places = np.unique(((np.arange(count) + 0.5) * len(source) / count).astype(int))
    probe = model.main_probe
    mapping = checkpoint["labelfree"].get("clusters", {}).get(probe)
    colours = panels.cluster_colours(data.meta, mapping, clusters_of(cfg, probe))
    classes = panels.class_colours(data.meta)
    images, truth, maps = [], [], []
    for batch in data.loader(
        Chosen(source, places.tolist()), geometry=Geometry.whole(cfg), purpose="gallery", batch_size=1
    ):
        valid = batch["valid"][0]
        window = slice(0, int(valid.any(1).sum())), slice(0, int(valid.any(0).sum()))
        _, scores = model.read(batch["image"].to(model.device))
        ids = readout.predict(scores[probe], batch["image"].shape[-2:])[0].cpu().numpy()[window]
        images.append(panels.as_picture(batch["image"][0])[window])
        maps.append(colours[ids])
        if "label" in batch:
            label = batch["label"][0].numpy()[window]
            known = label != IGNORE
            truth.append(np.where(known[..., None], classes[np.where(known, label, 0)], panels.VOID).astype(np.uint8))
    return images, truth, maps, data.meta, probe
