"""DINOSAUR (Seitzer et al., ICLR 2023): a few slots share the patches of a picture and tell its frozen features again.

Slot attention groups the features; a decoder must make all of them out of the slots, by mean squared error. What one
slot explains is a group, scored against single objects (val/slots/*). Classes are clusters of the features that the
slots of a picture sum up (val/own/*, val/regions/*). Code: amazon-science/object-centric-learning-framework.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import chance, distributed
from common.errors import ConfigError
from common.precision import real
from evaluation import readout
from evaluation.readouts import Readout
from evaluation.slots import RegionClasses, SlotScore
from lightning_modules.base import Loss, UnsupervisedSegmenter
from models.backbone import Features
from models.slots.decoders import MLPDecoder, TransformerDecoder
from models.slots.slot_attention import (
    InputMLP,
    SlotAttention,
    SlotStart,
    SoftPosition,
    empty_slots,
    mass_means,
    slot_vectors,
)
from retrieval import kmeans

ITERATIONS = 100
"""Of k-means at most, of slots and of a picture's features."""


@dataclass
class Grouped:
    """What slots make of B pictures of N = h*w patches."""

    tokens: Tensor
    """Features [B,N,C]."""
    slots: Tensor
    """[B,K,S]."""
    attention: Tensor
    """Slot attention's map of its last iteration, [B,K,N]."""
    told: Tensor
    """The features again, [B,N,C]."""
    masks: Tensor
    """The groups, [B,K,N]; they sum to 1 over the slots."""
    grid: tuple[int, int]
    """h and w."""

    def maps(self) -> Tensor:
        """The masks as [B,K,h,w]."""
        return self.masks.unflatten(2, self.grid)


@dataclass
class WithNoise(Features):
    """Features and what the slots of their pictures begin with; and their groups once somebody has asked for them."""

    noise: Tensor | None = None
    grouped: Grouped | None = None


class Dinosaur(UnsupervisedSegmenter):
    """Codes = the features of a patch, drawn half the way to those of its group (the paper has no codes of patches)."""

    title = "DINOSAUR"
    newest: tuple[Tensor, WithNoise] | None = None
    """The newest pictures of an evaluation and their features: several read-outs ask for them."""

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(self.cfg, self.backbone)
        self.refuse_padding()
        channels, dim = self.backbone.dim, settings.slot_dim
        self.code_dim = channels
        soft = settings.position == "soft" or (settings.position == "auto" and not self.backbone.transformer)
        self.position = SoftPosition(channels) if soft else nn.Identity()
        self.inputs = InputMLP(channels, dim)
        self.start = SlotStart(dim)
        self.attention = SlotAttention(dim, dim, settings.iterations, settings.eps)
        own = settings.decoder[settings.decoder.kind]
        if settings.decoder.kind == "mlp":
            grid = cells(self.cfg.data.train_size, min(self.backbone.strides))
            self.decoder = MLPDecoder(dim, channels, grid, list(own.hidden), own.shares, own.init)
        else:
            self.decoder = TransformerDecoder(dim, channels, own.layers, own.heads)
        self.own = SlotClusters(settings.num_clusters, channels)
        draws = chance.generator(self.cfg.seed, "dinosaur.noise.program")
        shared = torch.randn(1, settings.slots, dim, generator=draws)
        self.register_buffer("shared_noise", shared, persistent=False)  # of features that come without their picture

    def param_groups(self) -> list[dict[str, Any]]:
        """One group, since the norm that is clipped is that of all parts together."""
        parts = (self.position, self.inputs, self.start, self.attention, self.decoder)
        return [{"name": "slots", "params": [value for part in parts for value in part.parameters()]}]

    # ------------------------------------------------------------------ slots

    def group(self, features: Features, noise: Tensor) -> Grouped:
        """noise [B,K,S]. Features are targets too, and carry no gradient."""
        maps = features.concat().detach()
        grid, tokens = tuple(maps.shape[-2:]), maps.flatten(2).transpose(1, 2)
        seen = self.inputs(self.position(maps).flatten(2).transpose(1, 2))
        slots, attention = self.attention(seen, self.start(noise.to(tokens)))
        told, masks = self.decoder(slots, tokens, grid, attention)
        chosen = attention if self.cfg.method.masks == "attention" else masks
        return Grouped(tokens, slots, attention, told, chosen, grid)

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """Mean squared error of the features that the slots tell."""
        settings, pictures = self.cfg.method, len(features.map)
        noise = step_noise(
            self.cfg.seed, self.global_step, pictures * distributed.world_size(), settings.slots, settings.slot_dim
        )
        found = self.group(features, distributed.own_slice(noise))
        total = F.mse_loss(real(found.told), found.tokens)
        return Loss(total, self._watched(found), codes=codes_of(found))

    @torch.no_grad()
    def _watched(self, found: Grouped) -> dict[str, Tensor]:
        """For the log, means over pictures: the share of the features' spread inside a picture that is told, the
        effective number of slots by what they explain, and how undecided masks are (1: all slots explain all alike)."""
        spread = (found.tokens - found.tokens.mean(1, keepdim=True)).square().mean((1, 2))
        left = (real(found.told) - found.tokens).square().mean((1, 2))
        masks = real(found.masks)
        entropy = torch.special.entr(masks).sum(1).mean() / math.log(masks.shape[1])
        return {
            "told": 1 - (left / spread.clamp(min=1e-12)).mean(),
            "used": torch.special.entr(masks.mean(2)).sum(1).exp().mean(),
            "entropy": entropy,
        }

    # ------------------------------------------------------------------ evaluation

    def features(self, images: Tensor) -> Features:
        found = super().features(images)
        return found if self.training or self.in_program else self._with_noise(found, images)

    def features_of(self, batch: dict[str, Any], view: str = "image") -> Features:
        images = batch[view]
        if self.training:
            return super().features_of(batch, view)
        if self.newest is None or self.newest[0] is not images:
            found = super().features_of(batch, view)
            self.newest = images, found if isinstance(found, WithNoise) else self._with_noise(found, images)
        return self.newest[1]

    def _with_noise(self, features: Features, images: Tensor) -> WithNoise:
        settings = self.cfg.method
        noise = picture_noise(self.cfg.seed, images, settings.slots, settings.slot_dim)
        return WithNoise(**{part.name: getattr(features, part.name) for part in fields(Features)}, noise=noise)

    def grouped(self, features: Features) -> Grouped:
        """The groups of pictures, by the noise of their own; computed once."""
        known = getattr(features, "grouped", None)
        if known is not None:
            return known
        noise = getattr(features, "noise", None)
        if noise is None:
            noise = self.shared_noise.expand(len(features.map), -1, -1)
        found = self.group(features, noise)
        if isinstance(features, WithNoise):
            features.grouped = found
        return found

    def embed(self, features: Features) -> Tensor:
        return codes_of(self.grouped(features))

    def scores(self, features: Features) -> Tensor:
        """The strongest mask of any slot of a cluster, 0..1; slots without a cluster take no part."""
        found = self.grouped(features)
        clusters = self.clusters_of(found)
        masks = found.masks.masked_fill((clusters < 0)[:, :, None], 0.0)
        index = clusters.clamp(min=0)[:, :, None].expand_as(masks)
        best = masks.new_zeros(len(masks), self.cfg.method.num_clusters, masks.shape[2])
        return best.scatter_reduce(1, index, masks, "amax").unflatten(2, found.grid)

    def log_probs(self, codes: Tensor, scores: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """As of every method; masks are shares already, which are enlarged and made to sum to 1."""
        found = super().log_probs(codes, scores, size)
        if "own" in scores:
            shares = readout.upsample(scores["own"], size).clamp(min=1e-8)
            found["own"] = (shares / shares.sum(1, keepdim=True)).log()
        return found

    def clusters_of(self, found: Grouped) -> Tensor:
        """The cluster of every slot, int64 [B,K]; -1 where it is empty."""
        ids = self.own.assign(slot_vectors(found.masks, found.tokens).flatten(0, 1)).view(found.masks.shape[:2])
        return ids.masked_fill(empty_slots(found.masks), -1)

    def clustered_regions(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Masks [B,K,h,w] of slots and their clusters [B,K], -1 for none."""
        found = self.grouped(self.features_of(batch))
        return found.maps(), self.clusters_of(found)

    @property
    def readouts(self) -> list[Readout]:
        scores = [SlotScore("slots", slot_ids, self.meta)]
        if self.cfg.method.compare:
            scores.append(SlotScore("feature_groups", feature_groups, self.meta))
        if self.meta.has_labels:
            scores.append(RegionClasses(self.cfg.method.num_clusters, self.meta, self.cfg.evaluation))
        return [*super().readouts, *scores]

    # ------------------------------------------------------------------ classes of the method's own

    def on_train_start(self) -> None:
        super().on_train_start()
        self.own.fitted.fill_(False)  # clusters of a run that is prolonged belong to its old slots

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.newest = None  # groups of other weights
        if "regions" in self.further:
            self.further["regions"].ready = self.own_fitted

    @property
    def own_fitted(self) -> bool:
        return bool(self.own.fitted)

    @torch.no_grad()
    def fit_own(self) -> None:
        """k-means of the slots of pictures of `method.own.split`; a collective. Training pictures are seen as in
        training, without flips, so that kept features serve; validation pictures as in evaluation."""
        settings, found, data = self.cfg.method.own, [], self.trainer.datamodule
        training = settings.split == "train"
        seen = {"geometry": data.train_geometry, "order": "shuffled", "limit": settings.pictures} if training else {}
        for batch in self.unlabelled_loader(settings.split, purpose="dinosaur.own", **seen):
            with self.trainer.precision_plugin.forward_context():
                features = self.frozen_features(settings.split, batch)
                grouped = self.grouped(self._with_noise(features, batch["image"]))
            vectors, empty = slot_vectors(grouped.masks, grouped.tokens), empty_slots(grouped.masks)
            found.append(vectors[~empty])
        points = torch.cat(found) if found else torch.zeros(0, self.code_dim, device=self.device)
        key = chance.key(self.cfg.seed, "dinosaur.own")
        result = kmeans.fit_distributed(
            points, self.cfg.method.num_clusters, spherical=False, seed=key, iterations=ITERATIONS,
            restarts=settings.restarts,
        )  # fmt: skip
        self.own.set(result.centroids)

    def offline_state(self) -> dict[str, Tensor]:
        own = {name: value for name, value in self.state_dict().items() if name.startswith("own.")}
        return super().offline_state() | own


class SlotClusters(nn.Module):
    """Buffers `centroids` [K,C] and `fitted`; before a fit every slot is in cluster 0."""

    centroids: Tensor
    fitted: Tensor

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(count, channels))
        self.register_buffer("fitted", torch.tensor(False))

    def set(self, centroids: Tensor) -> None:
        self.centroids.copy_(centroids)
        self.fitted.fill_(True)

    def assign(self, vectors: Tensor) -> Tensor:
        """The nearest cluster of each vector [R,C]: int64 [R]."""
        gaps = self.centroids.square().sum(1) - 2 * real(vectors) @ self.centroids.T
        return gaps.argmin(1)


def codes_of(found: Grouped) -> Tensor:
    """[B,C,h,w]: a patch's features and the mean ones of the slots that explain it, half of each; detached."""
    masks = real(found.masks.detach())
    means = mass_means(masks, found.tokens).transpose(1, 2) @ masks
    return (found.tokens.transpose(1, 2) + means).div(2).unflatten(2, found.grid)


def slot_ids(model: Dinosaur, batch: Mapping[str, Any]) -> Tensor:
    """The slot of every pixel, int64 [B,H,W]."""
    return readout.predict(model.grouped(model.features_of(batch)).maps(), tuple(batch["image"].shape[-2:]))


def feature_groups(model: Dinosaur, batch: Mapping[str, Any]) -> Tensor:
    """For comparison: as many groups of each picture by k-means of its features alone, int64 [B,H,W]."""
    found, count = model.grouped(model.features_of(batch)), model.cfg.method.slots
    key, masks = chance.key(model.cfg.seed, "dinosaur.compare"), torch.zeros_like(found.masks)
    for mask, tokens in zip(masks, found.tokens, strict=True):
        centroids = kmeans.fit(tokens, count, seed=key, iterations=ITERATIONS, restarts=3).centroids
        ids = kmeans.assign(tokens, centroids)
        mask.scatter_(0, ids[None], 1.0)
    return readout.predict(masks.unflatten(2, found.grid), tuple(batch["image"].shape[-2:]))


def step_noise(seed: int, step: int, pictures: int, slots: int, dim: int) -> Tensor:
    """What the slots of a global batch begin with in a step, [B,K,S]."""
    return torch.randn(pictures, slots, dim, generator=chance.generator(seed, "dinosaur.noise", step))


def picture_noise(seed: int, images: Tensor, slots: int, dim: int) -> Tensor:
    """What the slots of pictures [B,3,H,W] in 0..1 begin with outside of training, [B,K,S].

    Keyed by what a picture shows (in 256 steps, padding of zeros left out), so that it is the same in any batch,
    process and command.
    """
    draws = []
    for image in (images.detach() * 255).round().to(torch.uint8).cpu().numpy():
        rows, columns = (np.flatnonzero(image.any(axis)) for axis in ((0, 2), (0, 1)))
        seen = image[:, : rows[-1] + 1, : columns[-1] + 1] if len(rows) else image[:, :0, :0]
        digest = hashlib.blake2b(np.ascontiguousarray(seen).tobytes(), digest_size=8).digest()
        key = int.from_bytes(digest, "big") >> 1
        draws.append(torch.randn(slots, dim, generator=chance.generator(seed, "dinosaur.picture", key)))
    return torch.stack(draws) if draws else torch.zeros(0, slots, dim)


def cells(size: Any, stride: int) -> tuple[int, int]:
    """Rows and columns of patches of pictures of `data.train_size` or `data.eval_size`."""
    height, width = (size, size) if isinstance(size, int) else size
    return -(-height // stride), -(-width // stride)


def check_settings(cfg: Any, backbone: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    settings, patches = cfg.method, math.prod(cells(cfg.data.eval_size, min(backbone.strides)))
    if cfg.data.eval_crop == "keep":
        raise ConfigError(
            "data.eval_crop=keep: padding would become patches that slots explain; set data.eval_crop=center or none"
        )
    if settings.slots > patches:
        raise ConfigError(
            f"method.slots={settings.slots}: a picture of data.eval_size={cfg.data.eval_size} has {patches} patches; "
            "lower method.slots"
        )
    kind, shares = settings.decoder.kind, settings.decoder.mlp.shares
    if (kind, shares, settings.masks) == ("mlp", "attention", "attention"):
        raise ConfigError(
            "method.masks=attention: with method.decoder.mlp.shares=attention the decoder's masks are that map "
            "already; set method.masks=decoder, or method.decoder.mlp.shares=said"
        )
    heads = settings.decoder.transformer.heads
    if kind == "transformer" and backbone.dim % heads:
        raise ConfigError(
            f"method.decoder.transformer.heads={heads}: must divide the {backbone.dim} channels of the features of "
            f"{backbone.name}; set another number of heads"
        )
    if settings.own.split == "val" and settings.own.pictures is not None:
        raise ConfigError(
            f"method.own.pictures={settings.own.pictures}: with method.own.split=val all pictures are clustered, as "
            "released; set method.own.pictures=null"
        )
