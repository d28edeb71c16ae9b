"""ACSeg (Li et al., CVPR 2023): vectors shared by all pictures become concepts of each, which share out its patches.

Patches of frozen features are a graph, and the concepts are trained to be its communities (modularity). Every patch
goes to its nearest concept, concepts without a patch vanish, so the number of regions is the picture's own. Regions of
the training pictures are clustered to classes when training ends, scored as val/own/*.

A reconstruction: nothing was released. The loss is certain; docs/methods/acseg.md says which choices are ours.
"""

import logging
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common import chance
from common.errors import ConfigError
from evaluation.readout import valid_patches
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.families.cut_regions import WithPictures
from lightning_modules.slots import concept_regions as found_in
from lightning_modules.slots.concept_regions import RegionClasses, Regions
from losses.modularity import concept_modularity, cosines
from models.backbone import Features
from models.slots.concept_generator import ConceptGenerator

log = logging.getLogger(__name__)

NEVER = -1e4
"""Score of a class that no region of the picture has; finite, since enlarging takes no share of infinity."""


class ACSeg(UnsupervisedSegmenter):
    """Codes = the mean unit feature of the region that a patch lies in, so patches of a region have one code."""

    title = "ACSeg"
    headline = "own"

    def build(self) -> None:
        settings = self.cfg.method
        self.refuse_padding()
        self.code_dim = self.backbone.dim
        generator = dict(settings.generator)
        self.generator = ConceptGenerator(generator.pop("concepts"), self.backbone.dim, **generator)
        self.salience = found_in.salience_kind(self.backbone, settings.background.score)
        self.background = int(self.salience != "none")
        if settings.num_clusters <= self.background:
            raise ConfigError(
                f"method.num_clusters={settings.num_clusters}: one of them is the background; set 2 or more, or "
                "method.background.score=none"
            )
        self.seeing = self.background or settings.regions.vectors != "mean"
        if settings.regions.vectors != "mean":
            self.backbone.check_size(settings.regions.size, "method.regions.size")
        width = found_in.vector_width(self.backbone, settings.regions.vectors)
        self.own = RegionClasses(settings.num_clusters - self.background, width, settings.classes.spherical)

    def param_groups(self) -> list[dict[str, Any]]:
        return [
            {"name": "generator", "params": self.generator.blocks.parameters()},
            {"name": "prototypes", "params": [self.generator.prototypes]},
        ]

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features) -> Loss:
        """Minus the modularity of the pictures under their concepts, a mean over pictures."""
        patches, _ = self.patches(features)
        concepts = self.generator(patches)
        loss = concept_modularity(patches, concepts).mean()
        regions = self._regions(features, patches, concepts.detach(), None)
        parts = {"modularity": -loss.detach(), "regions": regions.there.sum(1).float().mean()}
        return Loss(loss, parts, codes=self._painted(features, regions))

    def patches(self, features: Features) -> tuple[Tensor, Tensor | None]:
        """Unit features [B,P,D] of patches, less the picture's mean with `method.centred`; and which are padding, bool
        [B,P], where that is known."""
        maps = features.concat()
        unit = F.normalize(maps.flatten(2).mT, dim=2)
        valid = getattr(features, "valid", None)
        left_out = None if valid is None else ~valid_patches(valid, maps.shape[-2:]).flatten(1)
        if left_out is not None:
            left_out &= ~left_out.all(1, keepdim=True)
        if self.cfg.method.centred:
            kept = torch.ones_like(unit[..., :1]) if left_out is None else (~left_out)[..., None].to(unit)
            unit = F.normalize(unit - (unit * kept).sum(1, keepdim=True) / kept.sum(1, keepdim=True), dim=2)
        return unit, left_out

    def regions(self, features: Features) -> Regions:
        """Those of pictures, without gradient."""
        with torch.no_grad():
            patches, left_out = self.patches(features)
            return self._regions(features, patches, self.generator(patches, left_out), left_out)

    def _regions(self, features: Features, patches: Tensor, concepts: Tensor, left_out: Tensor | None) -> Regions:
        size = max((level.shape[-2:] for level in features.levels), key=lambda hw: hw[0] * hw[1])
        likeness = cosines(patches, concepts).mT.unflatten(2, size)
        ids = likeness.argmax(1)
        masks = F.one_hot(ids, likeness.shape[1]).permute(0, 3, 1, 2).bool()
        if left_out is not None:
            masks &= ~left_out.unflatten(1, size)[:, None]
        return Regions(likeness, ids, masks)

    # ------------------------------------------------------------------ read-out

    def features(self, images: Tensor) -> Features:
        return self._with(super().features(images), images, None)

    def features_of(self, batch: dict[str, Any], view: str = "image") -> Features:
        known = view == "image" and not self.training
        return self._with(super().features_of(batch, view), batch[view], batch["valid"] if known else None)

    def _with(self, features: Features, images: Tensor, valid: Tensor | None) -> WithPictures:
        parts = {part.name: getattr(features, part.name) for part in fields(Features)}
        return WithPictures(**parts, pictures=images if self.seeing else None, valid=valid)

    def embed(self, features: Features) -> Tensor:
        return self._painted(features, self.regions(features))

    @torch.no_grad()
    def _painted(self, features: Features, regions: Regions) -> Tensor:
        """Codes [B,D,h,w]; padding has those of its nearest concept too, where the picture has that region."""
        means = F.normalize(regions.means(F.normalize(features.concat(), dim=1)), dim=2)
        ids = regions.ids.flatten(1)[:, :, None].expand(-1, -1, means.shape[2])
        return means.gather(1, ids).mT.unflatten(2, regions.ids.shape[1:])

    @torch.no_grad()
    def scores(self, features: Features) -> Tensor:
        """The cosine to the most alike of a class's concepts, [B,K,h,w]; far below where the picture has none. Class 0
        is the background where it is told apart."""
        regions = self.regions(features)
        objects = self._objects(features, regions)
        classes = torch.zeros_like(objects, dtype=torch.int64)
        classes[objects] = self.background + self.own.assign(self.vectors(features, regions, objects))
        likeness = regions.likeness.masked_fill(~regions.there[:, :, None, None], NEVER)
        found = torch.full_like(likeness[:, :1], NEVER).repeat(1, self.cfg.method.num_clusters, 1, 1)
        return found.scatter_reduce_(1, classes[:, :, None, None].expand_as(likeness), likeness, "amax")

    def _objects(self, features: Features, regions: Regions) -> Tensor:
        """Regions that have a class of their own, bool [B,M]: all, or those that are no background."""
        if not self.background:
            return regions.there
        settings = self.cfg.method.background
        looked = found_in.patch_salience(
            self.backbone, features.pictures, features.concat(), self.salience, settings.heads
        )
        return found_in.foreground(regions, looked, settings.pool)

    def vectors(self, features: Features, regions: Regions, chosen: Tensor) -> Tensor:
        """What the chosen regions (bool [B,M]) look like, float32 [R,D], picture by picture."""
        settings = self.cfg.method.regions
        if settings.vectors == "mean":
            return regions.means(F.normalize(features.concat(), dim=1))[chosen]
        masked = settings.vectors == "masked"
        return found_in.crops_of(self.backbone, features.pictures, regions, chosen, masked, settings.size)

    def on_train_start(self) -> None:
        super().on_train_start()
        self.own.fitted.fill_(False)  # classes of a run that is prolonged belong to its old concepts

    @property
    def own_fitted(self) -> bool:
        return bool(self.own.fitted)

    @torch.no_grad()
    def fit_own(self) -> None:
        """Clusters of the regions of training pictures, seen as in evaluation."""
        settings, found = self.cfg.method.classes, []
        words = {"order": "shuffled", "limit": settings.pictures, "purpose": "acseg.classes"}
        for batch in self.unlabelled_loader("train", geometry="eval", **words):
            images, valid = (batch[name].to(self.device) for name in ("image", "valid"))
            with self.trainer.precision_plugin.forward_context():
                features = self._with(self.features(images), images, valid)
                regions = self.regions(features)
                found.append(self.vectors(features, regions, self._objects(features, regions)))
        points = torch.cat(found) if found else torch.zeros(0, self.own.centroids.shape[1], device=self.device)
        self.own.fit(points, settings, chance.key(self.cfg.seed, "acseg.classes"))

    def offline_state(self) -> dict[str, Tensor]:
        own = {name: value for name, value in self.state_dict().items() if name.startswith("own.")}
        return super().offline_state() | own
