"""`run.py clusters sweep=6..40`: label-free criteria against the number of clusters, as a plot and a table."""

import csv
import logging
import math
import re
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch.nn import functional as F

from common import chance
from common.errors import ConfigError
from common.files import whole
from datamodules.base import SegmentationDataModule
from engine import naming
from engine.clusters import read_out, restore
from evaluation import criteria, readout
from lightning_modules.base import UnsupervisedSegmenter
from retrieval import kmeans

log = logging.getLogger(__name__)

POINTS, PAIRED = 20000, 2000
"""Codes that are clustered, and those of them that all pairs are formed of (silhouette)."""
MOST = 36
"""Numbers of clusters tried at most; a longer range is tried at even steps."""
CRITERIA = {
    "cosine": ("mean cosine to the own centroid", "always rises: look for the bend", None),
    "silhouette": ("silhouette", "higher is better", max),
    "davies_bouldin": ("Davies-Bouldin index", "lower is better", min),
    "stability": ("agreement of two halves (adjusted Rand)", "higher is better", max),
}
"""Column -> (axis, how to read it, which value is the best)."""


def sweep(checkpoint_path: Path, text: str, tokens: list[str]) -> list[dict[str, float]]:
    """Cluster codes of training pictures anew for every K of a range `6..40`, and write sweep.csv and sweep.png into
    `<run>/clusters/<checkpoint name>/`.

    Returns a row a K: `clusters` and the columns of CRITERIA. Nothing of it reads a label, and nothing of it knows
    which classes a person wants. Raises ConfigError for a range that is none.
    """
    wanted = numbers(text)
    cfg, data, model, _ = restore(checkpoint_path, tokens)
    points = codes(cfg, data, model)
    if len(points) < 2 * wanted[-1]:
        raise ConfigError(
            f"sweep={text}: {len(points)} codes of training pictures are too few for {wanted[-1]} clusters in each "
            "half of them; lower it, or raise evaluation.kmeans.pictures"
        )
    iterations = cfg.evaluation.kmeans.iterations
    paired = points[torch.randperm(len(points), generator=chance.generator(cfg.seed, "sweep.paired"))[:PAIRED]]
    rows = []
    for k in wanted:
        fitted = kmeans.fit(points, k, seed=cfg.seed, iterations=iterations, restarts=cfg.evaluation.kmeans.restarts)
        ids, few = kmeans.assign(points, fitted.centroids), kmeans.assign(paired, fitted.centroids)
        row = {
            "clusters": k,
            "cosine": 1 - fitted.objective / 2,
            "silhouette": criteria.silhouette(paired, few),
            "davies_bouldin": criteria.davies_bouldin(points, ids),
            "stability": criteria.stability(points, k, cfg.seed, iterations),
        }
        log.info("K %d: %s", k, "  ".join(f"{name} {row[name]:.3f}" for name in CRITERIA))
        rows.append(row)
    folder = naming.folder_of(checkpoint_path, "clusters")
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "sweep.csv") as path, path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: "" if math.isnan(value) else f"{value:.6g}" for key, value in row.items()} for row in rows
        )
    plot(rows, f"{cfg.method.name} on {cfg.data.name}: {len(points)} codes").savefig(folder / "sweep.png")
    log.info("%s; with the number that you choose: run.py train … method.num_clusters=<K>", folder / "sweep.png")
    return rows


def numbers(text: str) -> list[int]:
    """`6..40` -> the numbers of clusters to try. Raises ConfigError."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 2 <= first < last:
        raise ConfigError(f"sweep={text}: expected a range of numbers of clusters from 2 on, as in sweep=6..40")
    return list(range(first, last + 1, -(-(last - first + 1) // MOST)))


def codes(cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter) -> torch.Tensor:
    """Unit codes [n,D] of patches of training pictures, drawn evenly from them by key, POINTS at most; on the CPU."""
    rows = []
    total = min(cfg.evaluation.kmeans.pictures, len(data.source("train")))
    share = max(1, POINTS // total)
    for batch, found, _ in read_out(cfg, data, model, "cluster"):
        patches = F.normalize(found.float().flatten(2), dim=1).transpose(1, 2).cpu()
        inside = readout.valid_patches(batch["valid"], found.shape[-2:]).flatten(1).cpu()
        for index, picture, valid in zip(batch["index"].tolist(), patches, inside, strict=True):
            picture = picture[valid]
            order = torch.randperm(len(picture), generator=chance.generator(cfg.seed, "sweep.points", index))
            rows.append(picture[order[:share]].clone())
    return torch.cat(rows)


def best(rows: list[dict[str, float]], name: str) -> dict[str, float] | None:
    """The row that is best by a criterion; None where there is no best value."""
    choose, known = CRITERIA[name][2], [row for row in rows if not math.isnan(row[name])]
    return choose(known, key=lambda row: row[name]) if choose and known else None


def plot(rows: list[dict[str, float]], title: str) -> Figure:
    """Four plots over K; the best K of each is marked."""
    figure = Figure(figsize=(9.5, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, (name, (label, hint, _)) in zip(figure.subplots(2, 2).flat, CRITERIA.items(), strict=True):
        axes.plot([row["clusters"] for row in rows], [row[name] for row in rows], "o-", color="#2a6fb8", ms=3.5, lw=1.4)
        top = best(rows, name)
        if top is not None:
            axes.axvline(top["clusters"], color="#c8861a", lw=1)
            axes.annotate(
                f"K = {top['clusters']}", (top["clusters"], 1), xycoords=("data", "axes fraction"), xytext=(4, -11),
                textcoords="offset points", fontsize=9, color="#9a6510",
            )  # fmt: skip
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_title(hint, fontsize=8.5, loc="right", color="#6a6e78")
        axes.set_xlabel("clusters", fontsize=9)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
