"""HSG (Ke et al., CVPR 2022): segments of several views, grouped by clustering transformers, finely and coarsely.

Cells of several views of a picture are sorted into segments by k-means, cut by contour regions. Two clustering
transformers gather the segments of all views of a picture into fine groups, and those into coarse ones; a transition
matrix composes the memberships. Groups shall be compact (modularity of a graph of near segments), balanced (collapse)
and distinctive (centroids apart). Cells are drawn to the other segments of their region, their fine and their coarse
group, away from all others of the batch (vMF-NCA). Code: twke18/HSG.
"""

from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from evaluation.hierarchy import HierarchyReadout
from evaluation.readouts import Readout
from grouping.gathered import GatheredSegments
from grouping.graph import knn_graph
from grouping.nodes import Nodes, picture_nodes
from grouping.segments import Segments, prototypes, sort_pixels, sorting, take
from lightning_modules.base import Loss
from lightning_modules.families.pixel_sorting import PixelSorter
from losses.grouping import centroid_contrast, collapse, modularity
from losses.vmf import vmf_nca
from models.backbone import Features
from models.hierarchy import HierarchicalGrouping, Hierarchy, PositionTables

LEVELS = ("fine", "coarse")
GOODNESS = ("modularity", "collapse", "centroid")
MAPS = ("segments", *LEVELS)
"""Levels of a picture's hierarchy, the finest first."""


class HSG(PixelSorter):
    """Codes = head(features), dense; probes read them. Trained: the head, both clustering transformers with their
    queries and positions, and, unless it is frozen, the backbone."""

    title = "HSG"

    def build(self) -> None:
        settings = self.cfg.method
        super().build()
        check_settings(settings)
        own = settings.transformer
        self.positions = PositionTables(settings.dim)
        self.hierarchy = HierarchicalGrouping(
            settings.dim,
            tuple(settings.groups),
            heads=own.heads,
            layers=own.layers,
            hidden=own.hidden,
            dropout=own.dropout,
            faithful=settings.faithful,
        )
        self.level_sorting = sorting(OmegaConf.create({**settings.kmeans, **settings.levels}), "method.levels")
        self.grouped = any(settings.weights[name] for name in GOODNESS)
        for part in (self.positions, self.hierarchy):
            part.requires_grad_(self.grouped)

    def trained_parts(self) -> dict[str, nn.Module]:
        grouping = nn.ModuleDict({"positions": self.positions, "hierarchy": self.hierarchy})
        return super().trained_parts() | ({"grouping": grouping} if self.grouped else {})

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Contrast at every level and goodness of grouping, on the cells of all views of the batch of all ranks."""
        settings, cells = self.cfg.method, self.cells(views)
        found, table = self.sort(cells.codes, cells.regions, cells.valid)
        keys = table.values(self.region_keys(views, cells.regions).flatten())
        terms = {"image": self._contrast("image", found, table, keys)}
        if self.grouped:
            nodes = self._nodes(found, table, tuple(cells.codes.shape[-2:]))
            groups = self.hierarchy(nodes.vectors, nodes.hidden, nodes.positions)
            terms |= self._levels(found, table, nodes, groups)
            terms |= self._goodness(nodes, groups)
        total = sum(settings.weights[name] * term for name, term in terms.items() if settings.weights[name])
        parts = {name: term.detach() for name, term in terms.items()}
        parts["segments"] = table.present.sum() / (len(cells.codes) * distributed.world_size())
        names = list(self.views)
        return Loss(total, parts, skip=~table.present.any(), codes=cells.codes[:: len(names)], view=names[0])

    # ------------------------------------------------------------------ the hierarchy of a picture

    @property
    def readouts(self) -> list[Readout]:
        if not self.grouped:
            return []
        own, groups = self.cfg.method.levels, self.hierarchy.groups
        rule = (
            f"grid {own.cells[0]}x{own.cells[1]}, {groups[0]} fine and {groups[1]} coarse groups, "
            f"{'nested' if own.nested else 'the likeliest group at each level'}; best match of each labelled region"
        )
        return [HierarchyReadout(MAPS, self.meta.num_classes, rule)]

    @torch.no_grad()
    def levels(self, images: Tensor, valid: Tensor) -> list[Tensor]:
        """Segments, fine and coarse groups of pictures, as the trained transformers group them; in evaluation mode.

        images [B,3,H,W] in 0..1, valid bool [B,H,W]. Returns int64 maps [B,h,w] at the cells of the network (at its
        output stride in training), -1 where no pixel of a cell is valid. Ids start at 0 in every picture and mean
        nothing beyond it. With `method.levels.nested` a coarse group is a union of fine ones, and these of segments;
        else each level takes the likeliest group of a segment, and a coarse one may cut a fine one. The release
        has no such inference. One view, no contour regions, no limit of segments.
        """
        with self.backbone.training_stride():
            codes = self.embed(self.features(images))
        size = tuple(codes.shape[-2:])
        touched = F.adaptive_max_pool2d(valid[:, None].float(), size)[:, 0] > 0  # so every pixel has a group
        found = sort_pixels(codes, **self.level_sorting, valid=touched)
        ids, own = found.ids.flatten(), self.cfg.method.levels
        bank = prototypes(found.unit.flatten(0, 1), ids, max(1, int(found.counts.sum())))
        slots = max(self.cfg.method.slots or 1, int(found.counts.max())) if self.hierarchy.fine.faithful else None
        places = self.positions(size).flatten(0, 1)
        nodes = picture_nodes(bank, ids, found.counts, places, 1, slots, fill=slots is not None)
        groups = self.hierarchy(nodes.vectors, nodes.hidden, nodes.positions)
        first = (found.counts.cumsum(0) - found.counts)[:, None]
        maps = [found.ids.where(found.ids < 0, found.ids - first).flatten()]
        for labels in groups.nested if own.nested else groups.labels:
            maps.append(take(nodes.of_segments(labels), ids, -1))
        return [level.view(len(images), *size) for level in maps]

    # ------------------------------------------------------------------ one step

    def _nodes(self, found: Segments, table: GatheredSegments, size: tuple[int, int]) -> Nodes:
        settings = self.cfg.method
        own, ids, places = table.prototypes[table.mine], found.ids.flatten(), self.positions(size).flatten(0, 1)
        return picture_nodes(own, ids, found.counts, places, settings.views, settings.slots, fill=settings.faithful)

    def _contrast(self, name: str, found: Segments, table: GatheredSegments, keys: Tensor) -> Tensor:
        """L_f of the labelling `keys` of the segments of all ranks, [S], -1 for segments that take no part."""
        inside = take(keys, table.own, -1) >= 0
        own = table.own.where(inside, -1)
        pixels = found.unit.flatten(0, 1)
        loss = vmf_nca(pixels, table.prototypes, keys, own, self.cfg.method.kappa[name])
        return loss * share(inside.sum())

    def _levels(self, found: Segments, table: GatheredSegments, nodes: Nodes, groups: Hierarchy) -> dict[str, Tensor]:
        """The contrastive term of each level that has a weight; labels are hard, so the transformers learn nothing."""
        terms, pictures = {}, len(nodes.table)
        first = self.reach.rank() * pictures + torch.arange(pictures, device=nodes.table.device)[:, None]
        for name, labels, count in zip(LEVELS, groups.labels, self.hierarchy.groups, strict=True):
            if self.cfg.method.weights[name]:
                keys = self.reach.gather(nodes.of_segments(first * count + labels))
                terms[name] = self._contrast(name, found, table, keys)
        return terms

    def _goodness(self, nodes: Nodes, groups: Hierarchy) -> dict[str, Tensor]:
        """L_g: modularity and collapse of both levels on one graph of segments, and the contrast of centroids."""
        settings, padding = self.cfg.method, nodes.padding
        own, faithful = settings.graph, settings.faithful
        views = nodes.views if own.per_view else None
        graph = knn_graph(nodes.vectors, padding, own.knn, views, settings.views)
        known = ~padding.all(1)
        part, kappa = share(known.sum()), settings.kappa.centroid
        terms = {
            "modularity": sum(modularity(level, graph, padding) for level in (groups.fine, groups.coarse)) * part,
            "collapse": sum(collapse(level, padding, slots=faithful) for level in (groups.fine, groups.coarse)) * part,
        }
        contrast = 0.0
        for centroids in (groups.fine_centroids, groups.coarse_centroids):
            inside = known.repeat_interleave(centroids.shape[1])
            rows = centroids.flatten(0, 1)
            contrast = contrast + centroid_contrast(
                rows,
                kappa,
                self.reach.gather(rows, grad=True),
                first=self.reach.rank() * len(rows),
                known=inside,
                present=self.reach.gather(inside),
            )
        return terms | {"centroid": contrast * part}


def share(counted: Tensor) -> Tensor:
    """This rank's part of what all ranks count, times the number of ranks: a rank's own mean times it, averaged over
    ranks as DDP averages gradients, is the mean over all."""
    return counted * distributed.world_size() / distributed.total(counted).clamp(min=1)


def check_settings(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    if settings.regions.source == "none":
        raise ConfigError(
            "method.regions.source=none: cells are drawn to their contour region; choose felzenszwalb, watershed, slic "
            "or folder"
        )
    if settings.dim % settings.transformer.heads:
        raise ConfigError(
            f"method.transformer.heads={settings.transformer.heads}: must divide method.dim={settings.dim}"
        )
    if not any(settings.weights.values()):
        raise ConfigError("method.weights: all are 0, so there is nothing to learn; set method.weights.image=1")
    for name in LEVELS:
        if settings.weights[name] and not any(settings.weights[term] for term in GOODNESS):
            raise ConfigError(
                f"method.weights.{name}={settings.weights[name]:g}: groups are learned by modularity, collapse and "
                f"centroid alone, whose weights are 0; set one of them, or method.weights.{name}=0"
            )
