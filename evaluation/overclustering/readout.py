"""Leopart's read-outs as one `Readout`: the keys `evaluation.{overcluster,cbfe,communities}.*` at work.

Before an evaluation, standardisation and PCA are fitted to codes of the pictures that are evaluated (and of training
pictures, where these take part). While it runs, the codes of each picture are reduced and kept, with its labels; at its
end the pictures of all ranks are gathered, in their order, on every rank, clustered and scored. Labels enter scores
alone, but for what is called `labels` in the configuration: that reads the labels of training pictures, and its rows
end in `_labelled`.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.errors import ConfigError
from common.spec import ClassMeta
from evaluation.foreground import object_classes
from evaluation.overclustering import clusters, graph, masks, pictures
from evaluation.overclustering.communities import Communities, CommunityFinder, Grouping
from evaluation.readouts import Readout
from retrieval import kmeans
from retrieval.whitening import Reduction

log = logging.getLogger(__name__)

FEWEST = 3
"""Clusters among which `foreground.cuts` has a place to try."""


@dataclass
class Solved:
    """What an evaluation found, for its scores and for panels."""

    over: dict[int, clusters.Clusters] = field(default_factory=dict)
    extraction: tuple[Tensor, Tensor, float] | None = None
    """Centroids [K,d] that masks vote for, the foreground ones int64 [n], and the threshold."""
    cbfe: dict[str, float] = field(default_factory=dict)
    grouping: Grouping | None = None
    communities: Communities | None = None


class Overclustering(Readout):
    """Ready once it has a `reduction`; what it keeps per picture says `pictures.py`."""

    name = "overclustering"
    groups = ("noisy foreground", "foreground", "communities (groups)")

    def __init__(self, cfg: Any, meta: ClassMeta) -> None:
        """cfg: the whole configuration. Raises ConfigError where its keys do not go together or with the data."""
        super().__init__()
        rules = cfg.evaluation
        self.over, self.cbfe, self.own = rules.overcluster, rules.cbfe, rules.communities
        self.rules_of, self.seed, self.meta = rules, int(cfg.seed), meta
        self.classes = cfg.method.num_clusters if not meta.has_labels else meta.num_classes
        self.objects = object_classes(meta, list(cfg.method.get("foreground") or []))
        self.reduction: Reduction | None = None
        self.trained: list[pictures.Picture] = []
        self.masks: dict[int, Tensor] = {}
        self.kind = ""
        self.kept: dict[int, pictures.Picture] = {}
        self.solved: Solved | None = None
        self.device = torch.device("cpu")
        self.check()

    def check(self) -> None:
        """Raises ConfigError for settings that cannot be."""
        if self.over.k and not self.meta.has_labels:
            raise ConfigError(
                f"evaluation.overcluster.k={list(self.over.k)}: these clusters are matched with labels and the data "
                "has none; set evaluation.overcluster.k=[]"
            )
        if self.own.clusters and not self.cbfe.clusters:
            raise ConfigError(
                f"evaluation.communities.clusters={self.own.clusters}: they are clusters of the foreground; set "
                "evaluation.cbfe.clusters too (Leopart 200)"
            )
        for key, on in (("cbfe.cut", self.cut_by_labels), ("communities.search", self.searches)):
            if not on:
                continue
            if not self.meta.has_labels or not self.cbfe.train_pictures:
                raise ConfigError(
                    f"evaluation.{key}=labels: labels of training pictures choose; the data must have some, and "
                    "evaluation.cbfe.train_pictures be above 0"
                )
            if key == "cbfe.cut" and self.cbfe.clusters < FEWEST:
                raise ConfigError(
                    f"evaluation.cbfe.clusters={self.cbfe.clusters}: labels choose among {FEWEST} clusters or more"
                )
            if key == "cbfe.cut" and not self.objects:
                raise ConfigError(
                    "evaluation.cbfe.cut=labels: the data does not say which classes are objects; set "
                    "evaluation.cbfe.cut=threshold"
                )

    @property
    def cut_by_labels(self) -> bool:
        """Whether labels choose the foreground clusters."""
        return bool(self.cbfe.clusters) and self.cbfe.cut == "labels"

    @property
    def searches(self) -> bool:
        """Whether labels choose the settings of communities."""
        return bool(self.own.clusters) and self.own.search == "labels"

    @property
    def ready(self) -> bool:
        return self.reduction is not None

    def most_clusters(self) -> tuple[str, int]:
        """The key with the most clusters of all codes, and how many."""
        wanted = [("evaluation.overcluster.k", max(self.over.k, default=0))]
        wanted.append(("evaluation.cbfe.clusters", self.cbfe.clusters))
        return max(wanted, key=lambda item: item[1])

    def begin(self, reduction: Reduction, trained: list[pictures.Picture], found: dict[int, Tensor], kind: str) -> None:
        """Before an evaluation: how codes are reduced, the training pictures that take part, the noisy foreground of
        the pictures that will be seen, bool [H,W] by index, and what it comes from."""
        self.reduction, self.trained, self.masks, self.kind = reduction, trained, found, kind
        self.reset()

    def taken(
        self, batch: Mapping[str, Any], codes: Tensor, masks: Mapping[int, Tensor], labelled: bool
    ) -> list[pictures.Picture]:
        """What is kept of a batch; `labelled`: whether its labels may be read."""
        return pictures.taken(batch, codes, self.reduction, self.over.size, labelled, masks)

    # ------------------------------------------------------------------ a Readout

    def see(self, model: Any, batch: Mapping[str, Any], codes: Tensor) -> dict[str, Tensor]:
        """Keeps the pictures of an evaluation; once that is over (`results`), maps of pictures for panels."""
        self.device = codes.device
        if self.solved is not None:
            return self.maps(model, batch, codes, self.solved)
        for picture in self.taken(batch, codes, self.masks, labelled=True):
            self.kept[picture.index] = picture
        return {}

    def reset(self) -> None:
        self.kept, self.solved = {}, None

    def compute(self) -> dict[str, float]:
        """All values as `<row>/<name>`; `results` has them by row."""
        return {f"{row}/{name}": value for row, item in self.results().items() for name, value in item.items()}

    def protocol(self) -> str:
        return "; ".join(f"{row}: {text}" for row, text in self.protocols().items())

    def results(self) -> dict[str, dict[str, float]]:
        """Scores by row: `overcluster_<k>`, `cbfe`, `communities`. A collective."""
        every = [picture for part in distributed.objects(list(self.kept.values())) for picture in part]
        self.kept, self.masks = {}, {}
        every.sort(key=lambda picture: picture.index)
        self.solved = distributed.objects(self.solve(every))[0]  # as rank 0 has it, to the bit
        self.trained = []
        found: dict[str, dict[str, float]] = {}
        for k, item in self.solved.over.items():
            found[f"overcluster_{k}"] = item.values
        if self.cbfe.clusters:
            found[self.row("cbfe")] = self.solved.cbfe
        if self.solved.communities is not None:
            found[self.row("communities")] = self.solved.communities.values
        return found

    def row(self, name: str) -> str:
        """`cbfe` or `communities` as keys of metrics.json have it, marked where labels of training pictures chose."""
        marked = self.cut_by_labels or (name == "communities" and self.searches)
        return f"{name}_labelled" if marked else name

    def protocols(self) -> dict[str, str]:
        over, cbfe, own = self.over, self.cbfe, self.own
        points = "all points" if over.points is None else f"{over.points} points at most"
        place = "own pixels" if over.size is None else f"{over.size} x {over.size} places"
        codes = f"codes standardised, PCA {over.dims}, k-means of {points}, {place}, absent {self.rules_of.absent}"
        found = {}
        for k in over.k:
            matching = "hungarian by IoU" if k <= self.classes else "many-to-one by precision"
            found[f"overcluster_{k}"] = f"Leopart: {codes}, {matching}, {over.seeds} seeds"
        if not cbfe.clusters:
            return found
        training = f", with {cbfe.train_pictures} training pictures at most" if cbfe.train_pictures else ""
        foreground = f"{cbfe.clusters} clusters that {self.kind} votes for (mass {cbfe.mass:g})"
        if self.kind != "attention":
            foreground = f"{cbfe.clusters} clusters that the {self.kind} foreground votes for"
        threshold = f"{cbfe.threshold:g}, fixed"
        if self.cut_by_labels:
            threshold = "chosen by labels of training pictures"
            if self.solved is not None and self.solved.extraction is not None:
                threshold = f"{self.solved.extraction[2]:g}, {threshold}"
        foreground += f", precision {threshold}{training}"
        found[self.row("cbfe")] = (
            f"Leopart CBFE: {codes}, {foreground}, {self.classes - 1} clusters and background, hungarian by IoU, "
            f"{over.seeds} seeds"
        )
        if own.clusters:
            settings = self.solved.grouping if self.solved is not None else None
            settings = settings or Grouping(own.clusters, own.weight, own.time)
            how = f"chosen by labels of training pictures in {own.trials} trials" if self.searches else "fixed"
            found[self.row("communities")] = (
                f"Leopart CBFE+CD: {codes}, {foreground}, {settings.clusters} clusters, {own.algorithm}, weight "
                f"{settings.weight:g}, time {settings.time:g} ({how}), distances {list(own.distances)}, angles "
                f"{own.angles}, hungarian by IoU, {own.seeds} seeds"
            )
        return found

    # ------------------------------------------------------------------ what is found

    def rules(self) -> clusters.Rules:
        """How clusters are fitted and scored."""
        own = self.rules_of
        return clusters.Rules(
            classes=self.meta.num_classes, seed=self.seed, iterations=self.over.iterations,
            restarts=self.over.restarts, points=self.over.points, absent=own.absent,
            background=own.background if own.background < max(1, self.meta.num_classes) else 0, device=self.device,
        )  # fmt: skip

    def solve(self, every: Sequence[pictures.Picture]) -> Solved:
        """All results for the pictures that were seen, in their order."""
        rules, found = self.rules(), Solved()
        for k in self.over.k:
            found.over[k] = clusters.over_clusters(every, k, self.over.seeds, rules)
        if not self.cbfe.clusters:
            return found
        threshold = None if self.cut_by_labels else self.cbfe.threshold
        extraction = clusters.extract(self.trained, list(every), self.cbfe.clusters, threshold, self.objects, rules)
        found.extraction = extraction.centroids, extraction.foreground, extraction.threshold
        found.cbfe = clusters.objects_found(extraction.scored, self.objects)
        if self.meta.has_labels:
            found.cbfe |= clusters.foreground_clusters(extraction, self.classes - 1, self.over.seeds, rules)
        if self.own.clusters:
            found.grouping, found.communities = self.communities(extraction, rules)
        return found

    def communities(
        self, extraction: clusters.Extraction, rules: clusters.Rules
    ) -> tuple[Grouping, Communities | None]:
        """The communities of the foreground, and the settings that they were found with."""
        own = self.own
        finder = CommunityFinder(extraction, own.algorithm, own.angles, own.distances, self.classes - 1, rules)
        settings = Grouping(own.clusters, own.weight, own.time)
        if self.searches:
            settings = finder.searched(own.trials)
            log.info("communities: labels of training pictures chose %s", settings)
        return settings, finder.run(settings, own.seeds)

    @torch.no_grad()
    def maps(self, model: Any, batch: Mapping[str, Any], codes: Tensor, solved: Solved) -> dict[str, Tensor]:
        """Id maps [B,H,W] for panels: classes, and groups where there are no labels or none is meant."""
        size, grid = tuple(batch["image"].shape[-2:]), tuple(codes.shape[-2:])
        points = self.reduction(codes.detach().flatten(2).mT).flatten(0, 1)

        def nearest(centroids: Tensor, spherical: bool = False) -> Tensor:
            return kmeans.assign(points, centroids.to(points.device), spherical).view(-1, *grid)

        found = {}
        for k, item in solved.over.items():
            found[f"overcluster_{k}"] = enlarged(named(nearest(item.centroids), item.classes), size)
        if solved.extraction is None:
            return found
        noisy = masks.noisy_foreground(model.backbone, batch["image"], self.kind, self.cbfe.mass)
        centroids, chosen, _ = solved.extraction
        inside = torch.isin(nearest(centroids, spherical=True), chosen.to(points.device))
        found |= {"noisy foreground": enlarged(noisy.long(), size), "foreground": enlarged(inside.long(), size)}
        if solved.communities is not None:
            own = solved.communities
            ids = torch.where(inside, nearest(own.centroids), len(own.centroids))
            if own.classes is None:
                found["communities (groups)"] = enlarged(named(ids, own.groups.numpy()), size)
            else:
                found["communities"] = enlarged(named(ids, own.classes), size)
        return found


def named(ids: Tensor, names: np.ndarray) -> Tensor:
    """The name of each id: int64, of the shape of `ids`."""
    return torch.from_numpy(np.asarray(names)).to(ids.device)[ids]


def enlarged(ids: Tensor, size: tuple[int, int]) -> Tensor:
    """Ids of patches [B,h,w] at the pixels [B,H,W]."""
    rows, columns = (
        torch.arange(new, device=ids.device) * old // new for new, old in zip(size, ids.shape[1:], strict=True)
    )
    return ids[:, rows[:, None], columns]


def configured(cfg: Any, meta: ClassMeta) -> list[Overclustering]:
    """The read-out, where any of it is asked for. Raises ConfigError, see `Overclustering.check`."""
    own = cfg.evaluation
    wanted = own.overcluster.k or own.cbfe.clusters or own.communities.clusters
    return [Overclustering(cfg, meta)] if wanted else []


def expect_packages(cfg: Any) -> None:
    """Raises ConfigError where the search for communities needs a package that is missing."""
    if cfg.evaluation.communities.clusters:
        graph.expect_algorithm(cfg.evaluation.communities.algorithm, "evaluation.communities.algorithm")
