"""`run.py clusters sweep=6..40`: what other numbers of clusters look like; `k=8` takes one, without training."""

import csv
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from omegaconf import DictConfig
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

import config
from common import chance
from common.errors import ConfigError
from common.files import whole
from common.spec import ClassMeta
from datamodules.base import SegmentationDataModule
from engine import checkpoints
from evaluation import criteria, readout
from inference import naming
from inspection import asked
from inspection.clusters import clusters, read_out, restore
from lightning_modules.base import UnsupervisedSegmenter
from reporting import panels
from retrieval import kmeans

log = logging.getLogger(__name__)

POINTS, PAIRED = 20000, 2000
"""Codes that are clustered, and those of them that all pairs are formed of (silhouette)."""
PICTURES, COLUMNS = 4, 6
"""Pictures that are shown, and the numbers of clusters that each is shown at, spread over the range."""
CRITERIA = {
    "cosine": ("mean cosine to the centroid", "always rises: look for the bend"),
    "silhouette": ("silhouette", "higher is better"),
    "davies_bouldin": ("Davies-Bouldin index", "lower is better"),
    "stability": ("agreement of two halves (adjusted Rand)", "higher is better"),
}
"""Column -> (axis, how to read it). They judge different things, so none of them names a winner."""


@dataclass(frozen=True)
class Seen:
    """A picture [3,H,W] without its padding, its id, and its codes [D,h,w]; `frame`: H and W with the padding."""

    name: str
    image: Tensor
    codes: Tensor
    frame: tuple[int, int]

    def ids(self, centroids: Tensor) -> np.ndarray:
        """The nearest of unit centroids [K,D] at every pixel, int64 [H,W]."""
        scores = readout.dot_products(self.codes[None], centroids)
        whole = F.interpolate(scores, size=self.frame, mode="bilinear", align_corners=False)[0].argmax(0)
        return whole[: self.image.shape[1], : self.image.shape[2]].numpy()


def sweep(checkpoint_path: Path, text: str, tokens: list[str]) -> list[dict[str, float]]:
    """Cluster codes of training pictures anew for every K of a range `6..40`, and write sweep.csv, sweep.png (criteria
    over K) and sweep_pictures.png (some pictures at several K, side by side) into `<run>/clusters/<checkpoint name>/`.

    Returns a row a K: `clusters` and the columns of CRITERIA. Nothing of it reads a label, and nothing of it knows
    which classes a person wants. Raises ConfigError for a range that is none.
    """
    wanted = asked.numbers(text)
    cfg, data, model, _ = restore(checkpoint_path, tokens)
    points, shown = codes(cfg, data, model)
    if len(points) < 2 * wanted[-1]:
        raise ConfigError(
            f"sweep={text}: {len(points)} codes of training pictures are too few for {wanted[-1]} clusters in each "
            "half of them; lower it, or raise evaluation.kmeans.pictures"
        )
    iterations = cfg.evaluation.kmeans.iterations
    columns: dict[int, Tensor] = {k: torch.empty(0) for k in spread(wanted)}
    paired = points[torch.randperm(len(points), generator=chance.generator(cfg.seed, "sweep.paired"))[:PAIRED]]
    rows = []
    for k in wanted:
        fitted = fit(cfg, points, k)
        if k in columns:
            columns[k] = fitted.centroids
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
    side_by_side(folder / "sweep_pictures.png", shown, columns)
    log.info(
        "%s shows pictures at several K, %s what criteria say of each: higher is better for silhouette and stability, "
        "lower for Davies-Bouldin; none knows which classes you want. To take one without training: "
        "run.py clusters ckpt=%s k=<K>",
        folder / "sweep_pictures.png", folder / "sweep.png", checkpoint_path,
    )  # fmt: skip
    return rows


def take(checkpoint_path: Path, k: int, tokens: list[str]) -> Path:
    """The k-means of a sweep at K = `k` as the k-means probe of a new checkpoint `<name>.k<K>.ckpt` beside the old one;
    nothing is trained, and the other probes stay. `clusters` then shows it; returns the new checkpoint.

    Raises ConfigError for fewer codes than clusters.
    """
    cfg, data, model, checkpoint = restore(checkpoint_path, tokens)
    points, _ = codes(cfg, data, model)
    if not 1 <= k <= len(points):
        raise ConfigError(f"k={k}: expected a number of clusters from 1 to {len(points)}, the codes that are clustered")
    facts = checkpoint["labelfree"]
    stored = config.changed(config.restore(facts["config"]), {"evaluation.kmeans.clusters": k})
    mappings = {probe: mapping for probe, mapping in facts.get("clusters", {}).items() if probe != "kmeans"}
    state = checkpoint["state_dict"] | {
        "kmeans_probe.centroids": fit(cfg, points, k).centroids.cpu(),
        "kmeans_probe.fitted": torch.tensor(True),
    }
    path = checkpoint_path.with_name(f"{checkpoint_path.stem}.k{k}.ckpt")
    with whole(path) as temporary, temporary.open("wb") as handle:
        changed = {"state_dict": state, "labelfree": facts | {"config": config.plain(stored), "clusters": mappings}}
        checkpoints.write(checkpoint | changed, handle)
    log.info("%s has the %d clusters of k=%d in its k-means probe; eval, predict and export take it", path, k, k)
    clusters(path, tokens)
    return path


def fit(cfg: DictConfig, points: Tensor, k: int) -> kmeans.KMeans:
    """K-means of unit codes [n,D] with the settings of `evaluation.kmeans`: one result for a sweep and for `take`."""
    own = cfg.evaluation.kmeans
    return kmeans.fit(points, k, seed=cfg.seed, iterations=own.iterations, restarts=own.restarts)


def spread(wanted: list[int]) -> list[int]:
    """Some of the numbers of clusters, first and last among them."""
    places = np.linspace(0, len(wanted) - 1, min(COLUMNS, len(wanted))).round().astype(int)
    return [wanted[place] for place in places]


def side_by_side(path: Path, shown: list[Seen], columns: dict[int, Tensor]) -> None:
    """A row a picture, a column a number of clusters [K,D]. Clusters keep their colour from column to column as far as
    they are the same ones: each takes the id of the nearest of the column before, one to one."""
    kept = torch.empty(0)
    maps: dict[str, Tensor] = {}
    for k, centroids in columns.items():
        ids = torch.full((k,), -1)
        if len(kept):
            own, before = linear_sum_assignment((centroids @ kept.T).numpy(), maximize=True)
            ids[torch.from_numpy(own)] = torch.from_numpy(before)
        ids[ids < 0] = torch.arange(len(kept), k)
        kept = torch.empty_like(centroids)
        kept[ids] = centroids
        maps[f"K = {k}"] = kept
    rows = [
        panels.Row(
            panels.as_picture(one.image),
            {name: one.ids(values) for name, values in maps.items()},
            None,
            one.name,
        )
        for one in shown
    ]
    panels.save(path, rows, ClassMeta(), groups=list(maps), cell=230)


def codes(cfg: DictConfig, data: SegmentationDataModule, model: UnsupervisedSegmenter) -> tuple[Tensor, list[Seen]]:
    """Unit codes [n,D] of patches of the pictures that k-means is fitted on (`evaluation.kmeans.roots`), drawn evenly
    from them by key, POINTS at most, on the CPU; and the first PICTURES of these pictures."""
    rows: list[Tensor] = []
    shown: list[Seen] = []
    total = min(cfg.evaluation.kmeans.pictures, data.clustered_count())
    share = max(1, POINTS // total)
    for batch, found, _ in read_out(cfg, data, model, "cluster", data.clustered_source()):
        patches = F.normalize(found.float().flatten(2), dim=1).transpose(1, 2).cpu()
        inside = readout.valid_patches(batch["valid"], found.shape[-2:]).flatten(1).cpu()
        for index, picture, valid in zip(batch["index"].tolist(), patches, inside, strict=True):
            picture = picture[valid]
            order = torch.randperm(len(picture), generator=chance.generator(cfg.seed, "sweep.points", index))
            rows.append(picture[order[:share]].clone())
        for row in range(min(len(found), PICTURES - len(shown))):
            valid = batch["valid"][row]
            inside = batch["image"][row][:, : int(valid.any(1).sum()), : int(valid.any(0).sum())]
            shown.append(Seen(batch["id"][row], inside, found[row].float().cpu(), tuple(valid.shape)))
    return torch.cat(rows), shown


def plot(rows: list[dict[str, float]], title: str) -> Figure:
    """Four plots over K, each with the direction that is good."""
    figure = Figure(figsize=(9.5, 6.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    for axes, (name, (label, hint)) in zip(figure.subplots(2, 2).flat, CRITERIA.items(), strict=True):
        axes.plot([row["clusters"] for row in rows], [row[name] for row in rows], "o-", color="#2a6fb8", ms=3.5, lw=1.4)
        axes.set_title(label, fontsize=10, loc="left")
        axes.set_title(hint, fontsize=8.5, loc="right", color="#6a6e78")
        axes.set_xlabel("clusters", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
