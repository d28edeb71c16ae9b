"""The parts of an explanation: each draws its figure into a folder and says what it shows; together they are a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from common import chance
from datamodules.files.opening import opened
from evaluation import readout
from inference.naming import Legend
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.relations import Place, Relation, Seen, cell
from reporting import embedding, figures, page, panels
from reporting.figures import Heat, Spot

LEGIBLE = 640
"""Narrower than this, px, no figure of the page becomes: it scrolls by itself on a narrow screen."""


@dataclass(frozen=True)
class View:
    """A picture, and the dot products [1,K,h,w] of its codes with the unit centroids of the probe."""

    seen: Seen
    scores: Tensor

    @property
    def cosines(self) -> Tensor:
        """Cosines of the codes to the centroids, [K,h,w]."""
        return self.scores[0] / torch.linalg.vector_norm(self.seen.codes[0], dim=0).clamp(min=readout.EPS)

    @property
    def picture(self) -> np.ndarray:
        """uint8 [H,W,3], without padding."""
        rows, columns = self.seen.size
        return panels.as_picture(self.seen.image[:, :rows, :columns])


@dataclass(frozen=True)
class Section:
    """A part of the page: title, what is to be seen, and the file of the figure (None: there is none)."""

    title: str
    text: str
    figure: str | None = None
    lossless: bool = False


def labels(folder: Path, view: View, spot: Spot, legend: Legend) -> Section:
    """The label map of the probe with the point."""
    rows, columns = view.seen.size
    ids = readout.predict(view.scores, tuple(view.seen.image.shape[-2:]))[0, :rows, :columns].cpu().numpy()
    grid = tuple(view.scores.shape[-2:])
    figures.labels(folder / "labels.png", view.picture, ids, spot, grid, legend.names, legend.colours)
    return Section("Its cluster", "The cross is the point, the frame the patch that it lies in.", "labels.png")


def similar(folder: Path, view: View, spot: Spot, place: Place) -> Section:
    """Cosines of the patch to all others of the picture: of codes, and of backbone features."""
    maps = {"codes": view.seen.codes, "features of the backbone": view.seen.features.concat()}
    heats = []
    for name, values in maps.items():
        cosines = similarity(values[0].float(), place)
        inside = view.seen.inside(tuple(cosines.shape)).cpu()
        heats.append(Heat(f"cosine of {name}", cosines.cpu().numpy(), float(cosines.cpu()[inside].min()), 1.0))
    figures.heats(folder / "similarity.png", view.picture, spot, heats)
    text = (
        "Cosine of the framed patch to every patch of the picture, left of the codes that are clustered, right of the "
        "features that they are made of. Each scale begins at the lowest cosine of its map."
    )
    return Section("Which patches are like it", text, "similarity.png")


def similarity(maps: Tensor, place: Place) -> Tensor:
    """Cosines [h,w] of the patch at a place to all patches of maps [D,h,w]."""
    unit = F.normalize(maps, dim=0, eps=readout.EPS)
    row, column = cell(place, tuple(maps.shape[-2:]))
    return torch.einsum("d,dhw->hw", unit[:, row, column], unit)


def attention(folder: Path, model: UnsupervisedSegmenter, view: View, spot: Spot, place: Place) -> Section:
    """Where the backbone's last block looks from this patch; for a transformer."""
    title, backbone = "Where the backbone looks from it", model.backbone
    if not backbone.has_attention:
        text = f"Left out: the backbone {backbone.name} ({backbone.network}) has no attention layers."
        return Section(title, text)
    features = backbone.features(view.seen.image[None], attention=True)
    grid = tuple(side // backbone.stride for side in view.seen.image.shape[-2:])
    shares = attention_row(features.attention[0], features.prefix, place, grid)
    elsewhere = 1 - shares.sum((1, 2)).mean()
    heads = shares.cpu().numpy()
    maps = [Heat("mean over heads, %", 100 * heads.mean(0), 0.0)]
    maps += [Heat(f"head {number}, %", 100 * own, 0.0) for number, own in enumerate(heads, 1)]
    figures.heats(folder / "attention.png", view.picture, spot, maps, columns=4)
    text = f"Attention of the last block, {len(heads)} heads, from the framed patch to every patch (of all tokens)."
    if features.prefix:
        text += f" Tokens that are no patch ({features.prefix}) get {100 * float(elsewhere):.1f} % on average."
    return Section(title, text, "attention.png")


def attention_row(logits: Tensor, prefix: int, place: Place, grid: tuple[int, int]) -> Tensor:
    """Logits [heads,T,T] -> what the patch at a place gives to every patch, [heads,h,w], out of 1 for all T tokens."""
    row, column = cell(place, grid)
    shares = logits[:, prefix + row * grid[1] + column].float().softmax(-1)
    return shares[:, prefix:].unflatten(1, grid)


def relation(folder: Path, found: Relation, views: Sequence[View], spot: Spot) -> Section:
    """What the method itself holds together with the patch."""
    if not found.maps:
        return Section(found.title, found.rule)
    path = folder / f"{found.name}.png"
    if found.maps[0].is_floating_point():
        figures.neighbourhood(path, views[0].picture, spot, found.maps[0].cpu().numpy())
        return Section(found.title, found.rule, path.name)
    masks = []
    for view, own in zip(views, found.maps, strict=True):
        rows, columns = view.seen.size
        whole = readout.upsample_ids(own[None].long(), tuple(view.seen.image.shape[-2:]))[0].bool()
        masks.append(whole[:rows, :columns].cpu().numpy())
    counts = [int(own.sum()) for own in found.maps]
    captions = [f"{count} in {view.seen.name}" for view, count in zip(views, counts, strict=True)]
    figures.gallery(path, [view.picture for view in views], masks, captions, spot)
    text = f"{found.rule} The ring in the first picture is the patch."
    return Section(found.title, text, path.name)


def codes(folder: Path, views: Sequence[View], place: Place, legend: Legend, how: str, most: int, seed: int) -> Section:
    """Codes of patches of all pictures as points of a plane, in cluster colours; `most` of them, a keyed choice."""
    rows, ids = [], []
    for view in views:
        inside = view.seen.inside(tuple(view.scores.shape[-2:]))
        rows.append(F.normalize(view.seen.codes[0][:, inside].T, dim=1, eps=readout.EPS))
        ids.append(view.scores[0].argmax(0)[inside])
        if view is views[0]:
            row, column = cell(place, tuple(inside.shape))
            own = int(inside.flatten()[: row * inside.shape[1] + column].sum())
    points, clusters = torch.cat(rows), torch.cat(ids)
    order = torch.randperm(len(points), generator=chance.generator(seed, "explain.points"))
    chosen = torch.cat([torch.tensor([own]), order[order != own][: most - 1]])
    placed, axes = embedding.embed(points[chosen.to(points.device)], how, seed)
    numbers = clusters.cpu()[chosen].numpy()
    figures.scatter(folder / "embedding.png", placed, numbers, 0, legend.names, legend.colours, axes)
    name = {"pca": "their two principal components", "umap": "UMAP (cosine)"}[how]
    text = (
        f"Unit codes of {len(chosen)} of the {len(points)} patches of {len(views)} pictures by {name}, in the colours "
        "of their clusters. The ring is the patch."
    )
    return Section("Its place among the codes", text, "embedding.png", lossless=True)


def page_of(folder: Path, content: dict[str, Any], cfg: DictConfig, others: int, sections: Sequence[Section]) -> str:
    """The page: the clusters of the patch as a table, then every section with its figure inside."""
    heads = [page.numeric("id"), "cluster", page.numeric("cosine"), page.numeric("probability, %")]
    rows = [
        (page.number(item["id"], 0), item["name"], page.hexadecimal(item["colour"]),
         page.number(item["cosine"], 3), page.number(100 * item["probability"]))
        for item in content["clusters"]
    ]  # fmt: skip
    figures_of = [None if section.figure is None else figure(folder, section) for section in sections]
    return page.render(
        "explain.html.j2",
        picture=Path(content["picture"]).name,
        data=cfg.data.name,
        clusters=page.Table(heads, rows, "clusters"),
        others=others,
        windows=cfg.evaluation.window.size is not None,
        sections=list(zip(sections, figures_of, strict=True)),
        **{key: content[key] for key in SHOWN},
    )


SHOWN = ("point", "patch", "grid", "probe", "method", "checkpoint", "confidence", "lead")
"""What the page takes from explain.json as it is."""


def figure(folder: Path, section: Section) -> tuple[page.Picture, int]:
    """The figure of a section, and the width below which it does not become, px."""
    with opened(folder / section.figure) as image:
        shown = page.picture(image.convert("RGBA"), section.title, lossless=section.lossless)
        return shown, min(image.width, LEGIBLE)
