"""Methods whose classes are clusters of regions of a graph cut: their stage, and how they see new pictures."""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from datamodules.base import SegmentationDataModule
from grouping.spectral import RegionSpace
from lightning_modules.base.staged import StagedSegmenter, check_stage
from lightning_modules.families.graph_cuts import (
    Clusters,
    Eigenvectors,
    Regions,
    check_segments,
    patch_width,
    region_maps,
    say_features,
)
from models.backbone import Features
from pseudo_labels.steps import Results, Step
from pseudo_labels.views import Segments, View


@dataclass
class WithPictures(Features):
    """Features, the pictures that they are of, and where these are not padding (None: everywhere)."""

    pictures: Tensor | None = None
    valid: Tensor | None = None


class RegionSegmenter(StagedSegmenter):
    """A base. Eigenvectors -> regions -> clusters; the centroids are kept in the checkpoint.

    `reads_regions`: scores are the clusters of the regions of a picture, found by cutting its own graph; False where a
    trained network gives them.
    """

    reads_regions = True

    def build_regions(self) -> None:
        """For `build`: checks the keys and makes the buffers of the centroids."""
        settings = self.cfg.method
        check_stage(settings.stage, self.backbone)
        check_segments(settings)
        if settings.background and settings.num_clusters < 2:
            raise ConfigError(
                f"method.num_clusters={settings.num_clusters}: one of them is the background; set 2 or more, or "
                "method.background=false"
            )
        self.clusters = settings.num_clusters - int(settings.background)
        self.kind = settings.graph.kind
        crop = settings.regions.vectors == "crop" and self.kind == "deep"
        width = patch_width(self.backbone, settings.graph.features)
        width = 3 if self.kind == "colour" else self._crop_width() if crop else width
        self.register_buffer("region_mean", torch.zeros(width))
        components = settings.regions.pca
        self.register_buffer("region_axes", torch.zeros(width, components) if components else None)
        self.register_buffer("region_centroids", torch.zeros(self.clusters, components or width))
        if self.kind == "deep":
            say_features(self.backbone, settings.graph.features)

    def _crop_width(self) -> int:
        return self.backbone.channels[-1] if self.backbone.class_token else self.backbone.dim

    # ------------------------------------------------------------------ the stage

    def steps(self, data: SegmentationDataModule) -> list[Step]:
        return self.steps_of(self.kind)

    def steps_of(self, kind: str, suffix: str = "") -> list[Step]:
        """Eigenvectors, regions and clusters of a kind of graph; `suffix` of their names."""
        background = bool(self.cfg.method.background)
        vectors = Eigenvectors(self.backbone, self.cfg, kind, f"eigenvectors{suffix}")
        regions = Regions(self.backbone, self.cfg, vectors.name, background, kind, f"regions{suffix}")
        return [vectors, regions, Clusters(self.cfg, self.clusters, regions.name, f"clusters{suffix}")]

    def staged(self, results: Results, data: SegmentationDataModule) -> None:
        table = results["clusters"]
        for name in ("mean", "axes", "centroids"):
            kept = getattr(self, f"region_{name}")
            if kept is not None:
                kept.copy_(torch.from_numpy(table[name]))

    def labels(self, results: Results, suffix: str = "") -> View:
        """Pseudo-labels of the training pictures."""
        assignment = results[f"clusters{suffix}"]["assignment"]
        return Segments(results[f"regions{suffix}"], assignment, bool(self.cfg.method.background))

    def shown(self, results: Results) -> dict[str, View]:
        return {"pseudo-labels": self.labels(results)}

    # ------------------------------------------------------------------ new pictures

    def features(self, images: Tensor) -> Features:
        found = super().features(images)
        if not self.reads_regions:
            return found
        return WithPictures(**{part.name: getattr(found, part.name) for part in fields(found)}, pictures=images)

    def features_of(self, batch: dict[str, Any], view: str = "image") -> Features:
        found = super().features_of(batch, view)
        return replace(found, valid=batch["valid"]) if isinstance(found, WithPictures) and view == "image" else found

    def scores(self, features: Features) -> Tensor:
        """1 for the class of a patch and 0 for the others, [B,K,h,w]."""
        axes = self.region_mean.new_zeros(len(self.region_mean), 0) if self.region_axes is None else self.region_axes
        space = RegionSpace(self.region_mean, axes, self.region_centroids)
        settings, seed, background = self.cfg.method, int(self.cfg.seed), bool(self.cfg.method.background)
        ids = region_maps(
            self.backbone, features.pictures, settings, seed, space, background, self.kind, features.valid
        )
        return F.one_hot(ids, settings.num_clusters).permute(0, 3, 1, 2).float()
