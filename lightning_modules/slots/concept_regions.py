"""Regions that the concepts of a picture make of its patches: where they are, what they look like, their classes.

After ACSeg (Li et al., CVPR 2023, section 3). B pictures, M concepts, h x w patches, D channels, R regions, K classes.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import distributed
from common.errors import ConfigError
from common.precision import exact
from grouping import salience
from grouping.masks import tight_box
from lightning_modules.objects.crops import crop_vectors
from models.backbone import Backbone
from retrieval import kmeans

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Regions:
    """What the concepts of pictures win of their patches."""

    likeness: Tensor
    """float32 [B,M,h,w]: cosines of patches and concepts."""
    ids: Tensor
    """int64 [B,h,w]: the concept that is most alike."""
    masks: Tensor
    """bool [B,M,h,w]: the same, without padding. A concept without a patch is no region."""

    @property
    def there(self) -> Tensor:
        """bool [B,M]: whether the picture has the region."""
        return self.masks.flatten(2).any(2)

    def means(self, maps: Tensor) -> Tensor:
        """Means [B,M,D] of maps [B,D,h,w] inside the regions; zero where there is none."""
        with exact(maps.device):
            inside = self.masks.flatten(2).to(maps)
            return inside @ maps.flatten(2).mT / inside.sum(2, keepdim=True).clamp(min=1)


# Background.


def salience_kind(backbone: Backbone, wanted: str) -> str:
    """`none`, `class`, `all` or `lengths`: what says how much a patch is looked at, see `patch_salience`; with `auto`
    the first that the backbone has. Raises ConfigError for what it has not."""
    has = {"class": backbone.class_token and backbone.has_attention, "all": backbone.has_attention}
    if wanted == "auto":
        kind = "class" if has["class"] else "all" if has["all"] else "lengths"
        said = {"class": "the attention of the class token", "all": "the attention of all tokens (no class token was "
                "trained)", "lengths": "the lengths of its features (it has no attention)"}  # fmt: skip
        log.info("%s: background is told from objects by %s", backbone.name, said[kind])
        return kind
    if not has.get(wanted, True):
        needs = "trained class token behind attention" if wanted == "class" else "attention"
        raise ConfigError(
            f"method.background.score={wanted}: backbone={backbone.name} has no {needs}; use auto, lengths or none"
        )
    return wanted


def patch_salience(backbone: Backbone, images: Tensor, maps: Tensor, kind: str, heads: str) -> Tensor:
    """How much each patch is looked at in the last block, float32 [B,h,w] on the grid of the feature maps [B,D,h,w].

    kind: by the class token (`class`), or by all tokens together (`all`), after the softmax, as the mean or the least
    of the heads; `lengths`: of the features, which tell objects from background in networks without attention (SCDA,
    Wei et al., TIP 2017).
    """
    if kind == "lengths":
        return maps.norm(dim=1)
    found = backbone.features(images, attention=True)
    weights = found.attention.softmax(3)[..., found.prefix :]
    weights = weights[:, :, 0] if kind == "class" else weights.sum(2)
    weights = weights.mean(1) if heads == "mean" else weights.amin(1)
    looked = weights.unflatten(1, found.map.shape[-2:])[:, None]
    return F.interpolate(looked, maps.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


def foreground(regions: Regions, looked: Tensor, pool: str) -> Tensor:
    """Regions that are objects, bool [B,M]: those of the higher of two means of a picture's scores. A score is the sum
    of `looked` [B,h,w] inside a region, or its mean (`pool`)."""
    scores = regions.means(looked[:, None])[:, :, 0]
    if pool == "sum":
        scores = scores * regions.masks.flatten(2).sum(2)
    return salience.upper_of_two(scores, regions.there)


# Vectors and classes.


def vector_width(backbone: Backbone, vectors: str) -> int:
    """D of `crops_of`, or of the features."""
    return backbone.channels[-1] if vectors != "mean" and backbone.class_token else backbone.dim


def crops_of(backbone: Backbone, images: Tensor, regions: Regions, chosen: Tensor, masked: bool, size: int | None
             ) -> Tensor:  # fmt: skip
    """Float32 [R,D]: the chosen regions (bool [B,M]), picture by picture, each the box of its patches as a picture of
    its own, of `size` px a side or as large as it is; class token, or the mean of its map where none was trained.

    masked: what is not of the region has the network's mean colour.
    """
    found = [images.new_zeros(0, vector_width(backbone, "crop"))]
    for image, masks in zip(images, [m[c] for m, c in zip(regions.masks, chosen, strict=True)], strict=True):
        scale = torch.tensor([image.shape[2] / masks.shape[2], image.shape[1] / masks.shape[1]])
        for mask in masks:
            box = (tight_box(mask).cpu() * scale.repeat(2)).round().long()[None]
            shown = image
            if masked:
                inside = F.interpolate(mask[None, None].float(), image.shape[1:], mode="nearest")[0] > 0
                shown = torch.where(inside, image, backbone.mean[0].to(image))
            found.append(crop_vectors(backbone, shown, box, size))
    return torch.cat(found)


class RegionClasses(nn.Module):
    """Clusters of vectors of regions; buffers `centroids` [K,D] and `fitted`. Before a fit all are of cluster 0."""

    centroids: Tensor
    fitted: Tensor

    def __init__(self, count: int, dim: int, spherical: bool) -> None:
        super().__init__()
        self.spherical = spherical
        self.register_buffer("centroids", torch.zeros(count, dim))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, vectors: Tensor, settings: Any, seed: int) -> None:
        """k-means of this rank's vectors [R,D] and those of all others; a collective. settings: `restarts` and
        `iterations`. Where there are fewer than K, one class stays, and a line says so."""
        vectors = distributed.gather_uneven(vectors)
        self.centroids.zero_()
        if len(vectors) < len(self.centroids):
            log.warning(
                "the training pictures have %d regions for %d classes: all of them are one class",
                len(vectors), len(self.centroids),
            )  # fmt: skip
        else:
            found = kmeans.fit(
                vectors, len(self.centroids), spherical=self.spherical, seed=seed, iterations=settings.iterations,
                restarts=settings.restarts,
            )  # fmt: skip
            self.centroids.copy_(found.centroids)
        self.centroids.copy_(distributed.broadcast(self.centroids))  # engines may differ in the last bit
        self.fitted.fill_(True)

    def assign(self, vectors: Tensor) -> Tensor:
        """The cluster of each vector [R,D], from 0: int64 [R]."""
        if not self.fitted or not len(vectors):
            return torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
        return kmeans.assign(vectors.float(), self.centroids, self.spherical)
