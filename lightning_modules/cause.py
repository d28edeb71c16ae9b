"""CAUSE (Kim et al., 2023): patches are told apart by the concepts of a book, which is learnt first.

Three phases of a run (`method.phase`). book: vectors are fitted to the graphs of frozen features by modularity. head: a
light head is trained by contrast; patches whose concepts are alike are drawn together, against a slow copy of the head
in the batch and against a bank of its earlier projections. prototypes: K vectors are fitted to the graphs of the copy's
codes; they are the method's classes, scored as val/own/*. Code: ByungKwanLee/Causal-Unsupervised-Segmentation.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional as F

import config
from common import chance, distributed
from common.errors import ConfigError
from common.precision import real
from datamodules.base import SegmentationDataModule
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.families import head_start
from losses.concept_contrast import Likeness, between, concept_contrast, nearest
from losses.correspondence import quantile
from losses.grid_sampling import cells, grid_places, sampled
from losses.modularity import modularity_loss
from models.backbone import Backbone, Features
from models.concept_head import PLACES, ConceptTransformer
from models.heads import SegmentationHead, own_element_masks, patch_rows
from models.momentum import Momentum, towards
from retrieval import kmeans
from retrieval.concept_bank import ConceptBank

PATCHES_A_CONCEPT, MOST = 50, 2048
"""Where `method.concepts` is null: sampled patches that a concept has for itself at least, and the released number."""
SAME = 0.999
"""The highest threshold of concepts that are alike: a concept is like itself."""
LOOKED, POINTS = 256, 16384
"""Training pictures that the mean feature, and the patches that book and prototypes begin with, are of; patches of the
k-means of the prototypes."""


class Cause(UnsupervisedSegmenter):
    """Codes s = teacher(features), the slow copy's; `book` and `own` are vectors of features and of codes."""

    title = "CAUSE"
    sharpness = 3.0

    @classmethod
    def settled(cls, cfg: DictConfig, data: SegmentationDataModule) -> dict[str, Any]:
        """The size of the book: a fiftieth of the patches that there are, and of those that its phase samples."""
        if cfg.method.concepts is not None:
            return {}
        height, width = grid(cfg, Backbone(cfg.backbone, cfg.seed))
        rows, columns = cells(height, width, cfg.method.cell)
        overlays = config.plain(cfg)["phases"]
        books = sum(part["share"] for part in overlays if part.get("method.phase") == "book")
        steps = cfg.trainer.max_steps or cfg.trainer.max_epochs * data.steps_per_epoch
        if overlays:
            steps = steps * books / sum(part["share"] for part in overlays)
        looked = min(data.train_items * height * width, steps * cfg.data.batch_size * rows * columns)
        return {"method.concepts": max(cfg.method.num_clusters or 2, min(MOST, int(looked / PATCHES_A_CONCEPT)))}

    def build(self) -> None:
        settings = self.cfg.method
        self.refuse_padding()
        self.uses_labels = settings.prototypes == "labels" or settings.clipping == "joint"
        self.grid = grid(self.cfg, self.backbone)
        check_settings(settings, self.grid, self.uses_labels and not self.meta.has_labels)
        dim, self.code_dim, self.wide = self.backbone.dim, settings.dim, settings.head == "tr"
        self.head = (
            ConceptTransformer(dim, settings.dim, self.grid, settings.hidden)
            if self.wide
            else SegmentationHead(dim, settings.dim)
        )
        self.projection = nn.Linear(settings.dim, settings.projection_dim)
        self.teacher, self.teacher_projection = Momentum(self.head), Momentum(self.projection)
        # Whether the teacher has followed: after the first step of the head it is the student, as released.
        self.register_buffer("followed", torch.tensor(False))
        # What is taken off features before they are compared with the book, and off codes (`method.centre`).
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("code_mean", torch.zeros(settings.dim))
        self.register_buffer("started", torch.tensor(False))  # whether the prototypes stand where they begin
        self.register_buffer("near", torch.zeros(()))
        self.register_buffer("near_known", torch.tensor(False))
        self.book = uniform(settings.concepts, dim)
        self.own = uniform(settings.num_clusters, settings.dim)
        self.bank = ConceptBank(settings.concepts, settings.bank, settings.projection_dim)
        self.fresh: tuple[Tensor, Tensor] | None = None
        self._likeness: Likeness | None = None
        self._set_trained()

    def _trained(self) -> dict[str, list[nn.Parameter]]:
        """Group -> what the phase trains."""
        phase = self.cfg.method.phase
        if phase == "head":
            return {"head": [*self.head.parameters(), *self.projection.parameters()]}
        if phase == "book":
            return {"book": [self.book]}
        leaked = {"head": list(self.teacher.parameters())} if self.cfg.method.prototypes == "labels" else {}
        return {"prototypes": [self.own], **leaked}

    def _set_trained(self) -> None:
        """What the phase leaves alone takes no gradient."""
        parts = (self.head, self.projection, self.teacher, self.teacher_projection)
        for parameter in (self.book, self.own, *(p for part in parts for p in part.parameters())):
            parameter.requires_grad_(False)
        for parameters in self._trained().values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def param_groups(self) -> list[dict[str, Any]]:
        return [{"name": name, "params": parameters} for name, parameters in self._trained().items()]

    def embed(self, features: Features) -> Tensor:
        frozen = features.concat()
        return self._centred(self._codes_of(self.teacher.copy, frozen, self._queries(frozen)))

    def _centred(self, codes: Tensor) -> Tensor:
        """Codes [B,r,h,w] less their mean over the steps so far."""
        return codes - self.code_mean[:, None, None]

    def prototypes(self) -> Tensor:
        return self.own

    @torch.no_grad()
    def prepare(self, loader: Callable[..., Any]) -> None:
        """One pass over some training pictures: their mean feature, and random patches that the book begins with."""
        settings = self.cfg.method
        if head_start.begin(self, loader):
            self.teacher.update(0.0)
        if not settings.centre and settings.start == "uniform":
            return
        batches = loader("train", "train", order="shuffled", limit=LOOKED, purpose="cause.start")
        pictures = min(LOOKED, len(batches.dataset))
        place = pictures * distributed.rank() // distributed.world_size()
        sums = torch.zeros(len(self.mean) + 1, dtype=torch.float64, device=self.device)
        found = [self.book.new_empty(0, self.book.shape[1])]
        for batch in batches:
            maps = self.frozen_features("train", batch).concat()
            rows = patch_rows(maps).double()
            sums += torch.cat([rows.sum(0), rows.new_tensor([len(rows)])])
            for picture in maps.flatten(2).mT:
                found.append(self._few(picture, -(-len(self.book) // pictures), "cause.start", place))
                place += 1
        if settings.centre:
            sums = distributed.total(sums)
            self.mean.copy_(sums[:-1] / sums[-1])
        rows = F.normalize(distributed.gather_uneven(torch.cat(found)) - self.mean, dim=1)[: len(self.book)]
        if settings.start == "patches":
            self.book[: len(rows)] = rows

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """That of the phase. The probes read the teacher's codes, with its dropout."""
        frozen = features.concat()
        if self.cfg.method.phase == "book":
            return self._fit_book(features, frozen)
        if self.cfg.method.phase == "head":
            return self._train_head(frozen)
        return self._fit_prototypes(views, frozen)

    def _fit_book(self, features: Features, frozen: Tensor) -> Loss:
        loss = self._modularity(sampled(frozen, self._places(frozen)) - self.mean, self.book)
        codes = self._slow(frozen, self._queries(frozen), {})
        return Loss(loss, {"modularity": loss.detach()}, codes=self._followed(codes))

    def _fit_prototypes(self, views: dict[str, Any], frozen: Tensor) -> Loss:
        """The teacher is frozen, unless labels train it as in the release (`method.prototypes=labels`)."""
        masks = self._masks("prototypes", frozen)
        codes = self._centred(self._codes_of(self.teacher.copy, frozen, self._queries(frozen), masks))
        if self.cfg.method.start == "patches" and not self.started:
            self._start_prototypes()
        loss = self._modularity(sampled(codes, self._places(frozen)), self.own)
        parts = {"modularity": loss.detach()}
        if self.cfg.method.prototypes == "labels":
            leaked = self.linear_probe.loss(codes, views["label"], views["valid"], leaks=True)
            parts["leaked"] = leaked.detach()
            loss = loss + leaked
        return Loss(loss, parts, codes=codes)

    def _train_head(self, frozen: Tensor) -> Loss:
        places = self._places(frozen)
        if self.wide:
            queries = self._queries(frozen)
            whole = self._slow(frozen, queries, self._masks("teacher", frozen))
            taught = sampled(whole, places)
            learnt = sampled(self._codes_of(self.head, frozen, queries, self._masks("student", frozen)), places)
        else:
            whole = self._slow(frozen, None, self._masks("probe", frozen))
            few = sampled(frozen, places)
            taught = self._slow(few, None, self._masks("teacher", few))
            learnt = self._codes_of(self.head, few, None, self._masks("student", few))
        concepts = nearest(sampled(frozen, places) - self.mean, self.book)
        z, t = self.projection(learnt), self.teacher_projection(taught)
        loss, parts = self._contrast(z, t, concepts)
        # The bank takes them after the step, so that no patch meets itself in it.
        self.fresh = distributed.gather(concepts.flatten()), distributed.gather(real(t).flatten(0, 1))
        return Loss(loss, {"contrastive": loss.detach(), **parts}, codes=self._followed(whole))

    @torch.no_grad()
    def _start_prototypes(self) -> None:
        """Those of a spherical k-means on codes of some training pictures; of fewer codes than prototypes, codes."""
        batches = self.unlabelled_loader("train", "train", order="shuffled", limit=LOOKED, purpose="cause.prototypes")
        pictures = min(LOOKED, len(batches.dataset))
        place = pictures * distributed.rank() // distributed.world_size()
        found = [self.own.new_empty(0, self.own.shape[1])]
        for batch in batches:
            for codes in self.embed(self.frozen_features("train", batch)).flatten(2).mT:
                found.append(self._few(codes, -(-POINTS // pictures), "cause.prototypes", place))
                place += 1
        points = F.normalize(distributed.gather_uneven(torch.cat(found)), dim=1).cpu()
        if len(points) > len(self.own):
            points = kmeans.fit(points, len(self.own), seed=self.cfg.seed, iterations=20, restarts=10).centroids
        self.own[: len(points)] = distributed.broadcast(points.to(self.own))
        self.started.fill_(True)

    @torch.no_grad()
    def _followed(self, codes: Tensor) -> Tensor:
        """Codes of a step, centred; their mean follows those of the steps."""
        if self.cfg.method.centre:
            mean = distributed.mean(real(codes).mean((0, 2, 3)))
            towards(self.code_mean, mean, self.cfg.method.ema if self.code_mean.any() else 0.0)
        return self._centred(codes)

    def _slow(self, frozen: Tensor, queries: Tensor | None, masks: Mapping[str, Tensor | None]) -> Tensor:
        with torch.no_grad():
            return self._codes_of(self.teacher.copy, frozen, queries, masks)

    def _contrast(self, z: Tensor, t: Tensor, concepts: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the terms of all ranks' pictures: against the batch and, once there is a bank, against it."""
        settings = self.cfg.method
        likeness = self._table(concepts)
        first = self.reach.rank() * concepts.numel()
        batch = self.reach.gather(real(t).flatten(0, 1)), self.reach.gather(concepts.flatten())
        rows, of = self.bank.rows()
        sides = [(*batch, first), *([(rows, of, None)] if len(of) else [])]
        found = [
            concept_contrast(z, concepts, candidates, own, likeness, settings.temperature, first=start)
            for candidates, own, start in sides
        ]
        terms, pairs = (torch.cat(values) for values in zip(*found, strict=True))
        if settings.guarded:  # a picture without positives has no term
            loss = terms.sum() / distributed.mean((pairs > 0).sum().to(terms)).clamp(min=1e-12)
        else:
            loss = terms.where(pairs > 0, torch.nan).mean()
        used = (concepts.flatten().bincount(minlength=len(self.book)) > 0).to(terms)
        return loss, {
            "near": self.near.clone(),
            "positives": pairs[: len(z)].mean().detach(),
            "bank": self.bank.counts.sum().to(terms),
            "concepts_of_batch": (distributed.total(used) > 0).sum().to(terms),
        }

    @torch.no_grad()
    def _table(self, concepts: Tensor) -> Likeness:
        """Which concepts are alike, made once: the book is frozen. Where `method.near` is null, the threshold is that
        which a share 1 / K of the pairs of the phase's first step lies above, as many as K equal classes would give."""
        settings = self.cfg.method
        if self._likeness is None:
            cosines = between(self.book)
            if not self.near_known:
                seen = distributed.gather(concepts.flatten())
                found = quantile([cosines[seen][None, :, seen]], 1 - 1 / settings.num_clusters)
                self.near.copy_(found.clamp(settings.far, SAME) if settings.near is None else settings.near)
                self.near_known.fill_(True)
            self._likeness = Likeness(cosines > self.near, cosines < settings.far)
        return self._likeness

    def _modularity(self, vectors: Tensor, centres: Tensor) -> Tensor:
        settings = self.cfg.method
        return modularity_loss(vectors, centres, settings.modularity_temperature, guarded=settings.guarded)

    def _codes_of(
        self, head: nn.Module, inputs: Tensor, queries: Tensor | None, masks: Mapping[str, Tensor | None] | None = None
    ) -> Tensor:
        """Codes [B,r,h,w] of maps [B,C,h,w]; the MLP head also takes patches [B,n,C], to [B,n,r]."""
        masks = masks or {}
        if self.wide:
            return head(inputs, queries, masks)
        pair = masks.get("linear"), masks.get("nonlinear")
        if inputs.dim() == 4:
            return head(inputs, pair)
        flat = tuple(None if mask is None else mask.flatten(0, 1) for mask in pair)
        return head(inputs.flatten(0, 1), flat).unflatten(0, inputs.shape[:2])

    def _queries(self, frozen: Tensor) -> Tensor | None:
        """The book's vectors of the patches' concepts [B,P,C], as they are; None for the MLP head."""
        return self.book.detach()[nearest(frozen.flatten(2).mT - self.mean, self.book)] if self.wide else None

    # ------------------------------------------------------------------ draws

    def _few(self, rows: Tensor, count: int, purpose: str, place: int) -> Tensor:
        """`count` random rows of those [n,C] of the picture at a place of a pass, or all of them."""
        draws = chance.generator(self.cfg.seed, purpose, place)
        return rows[torch.randperm(len(rows), generator=draws)[:count].to(rows.device)]

    def _places(self, maps: Tensor) -> Tensor:
        """A random patch of each cell of each picture, flat places int64 [B,n]; drawn for the global batch."""
        side, size = self.cfg.method.cell, maps.shape[2:]
        rows, columns = cells(*size, side)
        order = cell_order(self.cfg.seed, self.global_step, len(maps) * distributed.world_size(), rows * columns, side)
        return grid_places(distributed.own_slice(order).to(maps.device), *size, side)

    def _masks(self, use: str, inputs: Tensor) -> dict[str, Tensor | None]:
        """Dropout of one pass through the head: place -> mask. inputs: maps [B,C,h,w], or patches [B,n,C]."""
        pictures, p = len(inputs), self.cfg.method.dropout
        shapes = {"linear": tuple(inputs.shape), "nonlinear": tuple(inputs.shape)}
        if self.wide:
            patches, channels = inputs.shape[2] * inputs.shape[3], inputs.shape[1]
            weights, rows = (pictures, patches, patches), (pictures, patches, channels)
            hidden = (pictures, patches, self.cfg.method.hidden)
            of_place = {"self_attention": weights, "cross_attention": weights, "hidden": hidden}
            shapes = {place: shapes.get(place) or of_place.get(place, rows) for place in PLACES}
        key = self.cfg.seed, self.global_step
        return {
            place: own_element_masks(key[0], f"cause.dropout.{use}.{place}", key[1], shape, p, inputs.device)
            for place, shape in shapes.items()
        }

    def after_step(self) -> None:
        if self.fresh is None:
            return
        momentum = self.cfg.method.ema if self.followed else 0.0
        self.teacher.update(momentum)
        self.teacher_projection.update(momentum)
        self.followed.fill_(True)
        concepts, rows = self.fresh
        self.bank.enqueue(concepts, rows, arrival_order(self.cfg.seed, self.global_step, concepts))
        self.fresh = None

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Group by group; with `method.clipping=joint` head, projection and linear probe by one norm, as released."""
        limit = self.cfg.optim.head.clip_norm
        if self.cfg.method.clipping == "group" or limit is None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
            return
        joint = [group for group in optimizer.param_groups if group["name"] in ("head", "linear_probe")]
        nn.utils.clip_grad_norm_([p for group in joint for p in group["params"]], limit)


def grid(cfg: DictConfig, backbone: Backbone) -> tuple[int, int]:
    """Rows and columns of patches of a training picture."""
    sides = cfg.data.train_size
    height, width = (sides, sides) if isinstance(sides, int) else sides
    stride = min(backbone.strides)
    return -(-height // stride), -(-width // stride)


def uniform(count: int, dim: int) -> nn.Parameter:
    """[count,dim] between -1/count and 1/count, as released."""
    return nn.Parameter(torch.empty(count, dim).uniform_(-1 / count, 1 / count))


def cell_order(seed: int, step: int, pictures: int, count: int, side: int) -> Tensor:
    """For each picture of the global batch, which patch of each cell is taken, int64 [pictures,count]."""
    draws = chance.generator(seed, "cause.places", step)
    return torch.randint(side * side, (pictures, count), generator=draws)


def arrival_order(seed: int, step: int, concepts: Tensor) -> Tensor:
    """The order in which the rows of a step, of concepts int64 [n], come to the bank: a permutation int64 [n]."""
    draws = chance.generator(seed, "cause.bank", step)
    return torch.randperm(len(concepts), generator=draws).to(concepts.device)


def check_settings(settings: Any, grid: tuple[int, int], lacking: bool) -> None:
    """Raises ConfigError for values that do not go together, or not with maps of this size. lacking: labels are to
    train and there are none."""
    if settings.head == "tr" and settings.head_start != "random":
        raise ConfigError(
            f"method.head_start={settings.head_start}: is a start of the MLP head; set random, or method.head=mlp"
        )
    if lacking:
        raise ConfigError(
            "method.prototypes=labels and method.clipping=joint let labels train as the release does, and the data has "
            "none; set prototypes=free and clipping=group"
        )
    if min(cells(*grid, settings.cell)) < 1:
        raise ConfigError(
            f"method.cell={settings.cell}: pictures have {grid[0]} x {grid[1]} patches, so there is no whole cell; "
            "make it smaller"
        )
    if settings.near is not None and settings.near < settings.far:
        raise ConfigError(
            f"method.near={settings.near:g}: lies below method.far={settings.far:g}, so concepts would be both alike "
            "and not; raise it"
        )
