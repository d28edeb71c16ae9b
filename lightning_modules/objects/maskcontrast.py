"""MaskContrast (Van Gansbeke et al., ICCV 2021): pixels are contrasted by the object masks that they lie in.

Offline, one mask a picture (`method.masks`, see families/mask_providers.py). Then two crops of a picture are seen, one
by a network and one by its slow copy: pixels of the object are drawn to the mean embedding (prototype) of the object in
the other crop, away from the prototypes of other pictures, those of a queue among them. A second output learns the mask
itself. Classes of its own: cluster 0 where that says background, else the cluster of the whole object, by k-means of
one whitened vector a picture. Code: wvangansbeke/Unsupervised-Semantic-Segmentation.

Here, and not as released: a crop that three draws do not find shows the whole picture, and no other one takes its
place; batch norms of several GPUs are synchronised, so keys are not shuffled among them.
"""

import copy
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common import chance, distributed
from common.errors import ConfigError, DataError
from common.spec import Cover, Geometric, Photometric, ViewSpec
from datamodules.base import SegmentationDataModule
from evaluation import readout
from grouping import masks as shapes
from lightning_modules.base import Loss
from lightning_modules.base.staged import check_stage
from lightning_modules.families.cut_regions import WithPictures
from lightning_modules.families.mask_providers import ProvidedMasks, check_masks
from lightning_modules.families.objects import ObjectFinder
from lightning_modules.objects.picture_clusters import PictureClusters
from losses.objects import mask_contrast as losses
from models.backbone import Backbone, Features
from models.deeplab import MaskHead
from models.momentum import follow
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import Saliency, View
from retrieval.memory import MemoryBank

VIEWS = ("query", "key")
NEVER = -1e4
"""Score of a cluster that the picture does not have; finite, since enlarging takes no share of infinity."""


class MaskContrast(ObjectFinder):
    """Codes = what both outputs of the head read; its pixel embeddings are contrasted. Trained: head and, unless it is
    frozen, backbone."""

    title = "MaskContrast"
    headline = "own"
    trains_backbone = None
    wants_features = False
    exports = "the backbone after the contrast of masks"

    def build(self) -> None:
        settings = self.cfg.method
        check_stage(settings.stage, self.backbone)
        check_masks(settings, self.backbone)
        check_settings(self.cfg)
        self.backbone.check_size(settings.augment.size, "method.augment.size")
        self.refuse_padding()
        self.build_foreground()
        self.code_dim = settings.head.hidden
        self.head = MaskHead(self.backbone.channels, settings.dim, **settings.head)
        hold(self.backbone, settings.freeze)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.key_backbone = None
        if not self.backbone.frozen:
            self.key_backbone = copy.deepcopy(self.backbone).requires_grad_(False)
        self.queue = MemoryBank(settings.queue.size, settings.dim)
        draws = chance.generator(self.cfg.seed, "maskcontrast.queue")
        self.queue.storage.copy_(F.normalize(torch.randn(self.queue.storage.shape, generator=draws), dim=1))
        self.queue.filled.fill_(settings.queue.size)
        self.own = PictureClusters(settings.num_clusters - 1, settings.dim)
        self.fresh: Tensor | None = None

    def train(self, mode: bool = True) -> "MaskContrast":
        """As usual, but parts that are held stay in evaluation mode, in both networks."""
        super().train(mode)
        for name in self.cfg.method.freeze:
            for network in (self.backbone, self.key_backbone):
                network.net.get_submodule(name).eval()
        return self

    @property
    def views(self) -> dict[str, ViewSpec]:
        """Two crops of a picture, each in colours of its own, that both show a part of the object and not it alone."""
        augment = self.cfg.method.augment
        names = ("brightness", "contrast", "saturation", "hue", "jitter_p", "gray_p")
        colour = Photometric(**{name: augment[name] for name in names}, blur_p=0.0)
        cover = Cover(share=tuple(augment.cover), tries=augment.tries)
        crop = Geometric(size=augment.size, scale=tuple(augment.scale))
        return {name: ViewSpec(colour, crop, cover=cover) for name in VIEWS}

    def param_groups(self) -> list[dict[str, Any]]:
        hold = self.epoch_steps if self.cfg.method.schedule_by == "epoch" else 1
        groups = [{"name": "head", "params": self.head.parameters(), "hold": hold}]
        if not self.backbone.frozen:
            trained = [value for value in self.backbone.parameters() if value.requires_grad]
            groups.append({"name": "backbone", "params": trained, "hold": hold})
        return groups

    def embed(self, features: Features) -> Tensor:
        return self.head(features.levels)

    # ------------------------------------------------------------------ the stage

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        return [ProvidedMasks(self, data.source("train"))]

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        usable = results["masks"].counts("masks") > 0
        if not usable.any():
            raise DataError(
                "method.masks: no training picture has an object, so there is nothing to contrast; lower "
                "method.masks.least, or take another method.masks.provider"
            )
        data.pseudo, data.usable = Saliency(results["masks"]), None if usable.all() else np.asarray(usable)

    def shown(self, results: Results) -> dict[str, View]:
        return {"object": Saliency(results["masks"])}

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Contrast of object pixels and the balanced loss of the mask. The slow copy moves before it sees the keys."""
        settings = self.cfg.method
        codes = self.embed(self.features(views["query"]))
        keys = self._keys(views["key"])
        inside, key_inside = ((views[f"{name}.pseudo"] == 1) & views[f"{name}.valid"] for name in VIEWS)
        prototypes = losses.mask_prototypes(keys, key_inside)
        there = key_inside.flatten(1).any(1) | (settings.queue.empty == "keep")
        contrast, pixels = self._contrast(self.head.classify(codes), inside, prototypes, there)
        summed = distributed.total if self.reach.ranks() > 1 else losses.same
        salience = losses.balanced_salience(self.head.salience(codes), inside, summed) * self.reach.ranks()
        self.fresh = prototypes[there]
        total = settings.weights.contrast * contrast + settings.weights.salience * salience
        parts = {"contrast": contrast.detach(), "salience": salience.detach(), "object": pixels / inside.numel()}
        return Loss(total, parts, codes=codes, view="query")

    @torch.no_grad()
    def _keys(self, images: Tensor) -> Tensor:
        """Pixel embeddings [B,D,h,w] of the slow copy, after its step towards the network as it is."""
        m = self.cfg.method.momentum
        follow(self.key_head, self.head, m)
        if self.key_backbone is not None:
            follow(self.key_backbone, self.backbone, m)
        backbone = self.backbone if self.key_backbone is None else self.key_backbone
        return self.key_head.classify(self.key_head(backbone.features(images).levels))

    def _contrast(self, maps: Tensor, inside: Tensor, prototypes: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """The contrastive loss of this rank, scaled so that the mean over ranks is that of the global batch, and how
        many object pixels this rank has; pictures whose key shows no object (`there` bool [B]) take no part."""
        inside = inside & there[:, None, None]
        pixels = inside.sum((1, 2))
        rows, counts, present = (self.reach.gather(part) for part in (prototypes, pixels, there))
        size = self.queue.size
        weights = losses.class_weights(torch.cat([counts, counts.new_zeros(size)]))
        contrast = losses.object_contrast(
            maps,
            inside,
            torch.cat([rows, self.queue.rows()]),
            weights,
            self.cfg.method.temperature,
            own=self.reach.rank() * len(maps) + torch.arange(len(maps), device=maps.device),
            present=torch.cat([present, present.new_ones(size)]),
            total=(counts * weights[: len(counts)]).sum(),
        )
        return contrast * self.reach.ranks(), pixels.sum()

    def after_step(self) -> None:
        self.queue.enqueue(self.fresh)

    # ------------------------------------------------------------------ objects of new pictures, and their classes

    def features_of(self, batch: dict[str, Any], view: str = "image") -> Features:
        found = super().features_of(batch, view)
        if view != "image":
            return found
        return WithPictures(**{part.name: getattr(found, part.name) for part in fields(Features)}, valid=batch["valid"])

    def seen_objects(self, features: Features) -> tuple[Tensor, Tensor, Tensor]:
        """Pixel embeddings [B,D,h,w], salience logits [B,h,w], and these at the size of the pictures, [B,H,W], where
        padding has none."""
        codes = self.embed(features)
        step = self.backbone.strides[0] if self.head.low is not None else self.backbone.stride
        valid = getattr(features, "valid", None)
        size = tuple(side * step for side in codes.shape[-2:]) if valid is None else tuple(valid.shape[-2:])
        cells = self.head.salience(codes)
        salience = readout.upsample(cells[:, None], size)[:, 0]
        salience = salience if valid is None else salience.masked_fill(~valid, -torch.inf)
        return self.head.classify(codes), cells, salience

    @torch.no_grad()
    def vectors(self, features: Features) -> Tensor:
        """One unit vector for the object of each picture, zero where there is none: [B,D]."""
        maps, _, salience = self.seen_objects(features)
        return losses.object_embedding(maps, salience, self.cfg.method.own.threshold)[0]

    def scores(self, features: Features) -> Tensor:
        """Salience at the cluster of the picture's object, its threshold at cluster 0; [B,K,h,w]."""
        maps, cells, salience = self.seen_objects(features)
        threshold = self.cfg.method.own.threshold
        clusters = self.own.assign(losses.object_embedding(maps, salience, threshold)[0])
        found = torch.full_like(cells.float(), NEVER)[:, None].repeat(1, self.cfg.method.num_clusters, 1, 1)
        found[:, 0] = threshold
        found[torch.arange(len(found), device=found.device), 1 + clusters] = cells.float()
        return found

    @torch.no_grad()
    def objects(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What the salience says, and the box of its largest piece."""
        found = self.seen_objects(self.features(images))[2]
        found = readout.upsample(found[:, None], tuple(images.shape[-2:]))[:, 0] > self.cfg.method.own.threshold
        pieces = [shapes.largest_component(mask, 8) for mask in found]
        return found, torch.stack([shapes.tight_box(piece) for piece in pieces])

    def on_train_start(self) -> None:
        super().on_train_start()
        self.own.fitted.fill_(False)  # clusters of a run that is prolonged belong to its old codes

    @property
    def own_fitted(self) -> bool:
        return bool(self.own.fitted)

    @torch.no_grad()
    def fit_own(self) -> None:
        """Clusters of one vector a picture, of `method.own.split`, seen as in evaluation."""
        settings, found = self.cfg.method.own, []
        for batch in self.unlabelled_loader(settings.split, geometry="eval", purpose="maskcontrast.own"):
            images, valid = (batch[name].to(self.device) for name in ("image", "valid"))
            with self.trainer.precision_plugin.forward_context():
                features = self.features(images)
            parts = {part.name: getattr(features, part.name) for part in fields(Features)}
            found.append(self.vectors(WithPictures(**parts, valid=valid)))
        points = torch.cat(found) if found else torch.zeros(0, self.cfg.method.dim, device=self.device)
        self.own.fit(distributed.gather_uneven(points), settings, chance.key(self.cfg.seed, "maskcontrast.own"))

    def offline_state(self) -> dict[str, Tensor]:
        own = {name: value for name, value in self.state_dict().items() if name.startswith("own.")}
        return super().offline_state() | own


def hold(backbone: Backbone, names: list[str]) -> None:
    """Take the gradients of parts of a network away, by their names in it. Raises ConfigError for one that it lacks."""
    for name in names:
        try:
            backbone.net.get_submodule(name).requires_grad_(False)
        except AttributeError:
            known = ", ".join(key for key, _ in backbone.net.named_children())
            raise ConfigError(f"method.freeze: {backbone.network} has no part '{name}'; it has {known}") from None


def check_settings(cfg: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    settings, batch = cfg.method, int(cfg.data.batch_size)
    if settings.queue.size % batch:
        near = max(1, round(settings.queue.size / batch)) * batch
        raise ConfigError(
            f"method.queue.size={settings.queue.size}: must be a multiple of data.batch_size={batch}, the batch over "
            f"all devices, so that it holds whole steps; set method.queue.size={near}"
        )
    if settings.num_clusters < 2:
        raise ConfigError(f"method.num_clusters={settings.num_clusters}: one of them is the background; set 2 or more")
    if settings.freeze and cfg.backbone.frozen:
        raise ConfigError(
            f"method.freeze={list(settings.freeze)}: the whole backbone is frozen; set backbone.frozen=false or "
            "method.freeze=[]"
        )
    if not any(settings.weights.values()):
        raise ConfigError("method.weights: all are 0, so there is nothing to learn; set method.weights.contrast=1")
