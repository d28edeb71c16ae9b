"""Steps of offline stages that cut graphs of patches: eigenvectors, regions with their features, clusters of regions.

For Deep Spectral and the normalised cut; the keys are those of their yamls. Sources: Shi and Malik (PAMI 2000);
Melas-Kyriazi et al., Deep Spectral Methods (CVPR 2022).
Shapes: B pictures, h x w patches, k eigenvectors, R regions of a picture, D channels.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from datamodules.base.transforms import NATIVE, Geometry
from grouping import eigen, masks, spectral
from lightning_modules.base.extents import own_extents, padded_maps
from models.backbone import Backbone
from pseudo_labels.cache import Record
from pseudo_labels.steps import MapStep, ReduceStep, Results, new_record, whole_patches

log = logging.getLogger(__name__)

KINDS = ("deep", "colour")
"""Of a graph: cosines of patch features (and neighbours in colour), or Gaussian weights of mean colours and places."""
FEATURES = ("keys", "levels")
"""Of patches: the keys of the last block, or the maps of `backbone.levels`."""


# Features of patches.


def patch_of(backbone: Backbone) -> int:
    """Pixels of a patch's side: what pictures are cut to multiples of."""
    return max(backbone.patch_multiple, min(backbone.strides))


def patch_features(backbone: Backbone, images: Tensor, kind: str = "keys") -> Tensor:
    """Float32 maps [B,C,h,w]: keys of the last block, heads side by side, or the levels (see FEATURES); of a network
    without attention always these."""
    if kind == "levels" or not backbone.has_attention:
        return backbone.features(images).concat()
    return backbone.features(images, keys=[-1]).keys[0]


def patch_width(backbone: Backbone, kind: str) -> int:
    """C of `patch_features`."""
    return backbone.channels[-1] if kind == "keys" and backbone.has_attention else backbone.dim


def say_features(backbone: Backbone, kind: str = "keys") -> None:
    """One line where keys are asked of a network that has none."""
    if kind == "keys" and not backbone.has_attention:
        log.info("%s", no_keys(backbone))


def no_keys(backbone: Backbone) -> str:
    """What graphs are made of where there are no keys, as a line."""
    return f"{backbone.name} has no attention keys: graphs are made of its features (backbone.levels) themselves"


def small_pictures(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [B,3,H,W] on a grid, bilinear with antialias: [B,3,h,w]."""
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)


def stage_geometry(settings: Any, interpolation: str) -> Geometry:
    """How a stage reads pictures: squeezed to `size` px a side, or as large as their files where it is null."""
    if settings.size is None:
        return Geometry(1, NATIVE, interpolation)
    return Geometry(settings.size if isinstance(settings.size, int) else tuple(settings.size), "none", interpolation)


def stage_cells(settings: Any, step: MapStep) -> int:
    """Patches of a picture in a stage; of one that keeps its own size the mean."""
    patch = patch_of(step.backbone)
    return math.prod(math.ceil(side / patch) for side in stage_sides(settings, step))


def stage_sides(settings: Any, step: MapStep) -> Sequence[float]:
    """Height and width of a picture in a stage, px; of one that keeps its own size the mean."""
    size = settings.size
    return step.sides if size is None else (size, size) if isinstance(size, int) else size


# Graphs and eigenvectors.


def graph_vectors(
    backbone: Backbone, images: Tensor, kind: str, graph: Any, eigs: Any
) -> tuple[eigen.Spectrum, tuple[int, int]]:
    """The eigenvectors of the graphs of pictures [B,3,H,W], and h and w of their grid; detached, float32."""
    if kind == "colour":
        patch = patch_of(backbone)
        size = tuple(-(-side // patch) for side in images.shape[-2:])
        weights = spectral.gaussian_affinity(
            small_pictures(images, size), graph.sigma_features, graph.sigma_places, graph.radius
        )
    else:
        maps = patch_features(backbone, images, graph.features)
        maps = spectral.centred(maps) if graph.centred else maps
        size = tuple(side * graph.scale for side in maps.shape[-2:])
        if graph.scale > 1:
            maps = spectral.upsampled(maps, size)
        weights = spectral.feature_affinity(
            maps.flatten(2).mT, normalize=graph.scale == 1, nonnegative=graph.nonnegative
        )
        if graph.colour_weight:
            weights = weights + graph.colour_weight * spectral.colour_affinity(small_pictures(images, size))
    count = min(eigs.k, weights.shape[-1])
    found = eigen.smallest(
        weights, count, normalized=graph.normalized, nearest="modulus", solver=eigs.solver, tolerance=eigs.tolerance
    )
    return found, size


class Eigenvectors(MapStep):
    """`eigenvalues` float32 [k] and `eigenvectors` float16 [k,h,w] of every picture; no chance in it."""

    def __init__(self, backbone: Backbone, cfg: Any, kind: str, name: str = "eigenvectors") -> None:
        super().__init__(backbone)
        self.kind, self.name = kind, name
        self.method, self.interpolation = cfg.method, cfg.data.interpolation

    def settings(self) -> dict[str, Any]:
        return {"kind": self.kind, "graph": dict(self.method.graph), "eigs": dict(self.method.eigs)}

    def geometry(self) -> Geometry:
        return stage_geometry(self.method.stage, self.interpolation)

    def record_bytes(self) -> int:
        cells = stage_cells(self.method.stage, self) * self.method.graph.scale**2
        return self.method.eigs.k * (4 + 2 * cells) + 1000

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = whole_patches(batch, patch_of(self.backbone))
        found, size = graph_vectors(self.backbone, images, self.kind, self.method.graph, self.method.eigs)
        maps = found.vectors.unflatten(2, size).half()
        rows = enumerate(zip(found.values.float(), maps, strict=True))
        return [new_record(batch, i, images, size, eigenvalues=v, eigenvectors=m) for i, (v, m) in rows]


# Regions.


def check_segments(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    if settings.segments.mode == "adaptive" and settings.eigs.k < 3:
        raise ConfigError(f"method.eigs.k={settings.eigs.k}: the gap of eigenvalues needs at least 3")


def segment(values: Tensor, vectors: Tensor, settings: Any, seed: int, index: int) -> Tensor:
    """Segments int64 [h,w] of a picture by its eigenvalues [k] and eigenvectors [k,h,w]; 0 is the background."""
    if settings.mode == "single":
        return spectral.foreground(vectors[1]).long()
    count = spectral.adaptive_count(values) if settings.mode == "adaptive" else settings.count
    return spectral.multi_region(vectors, count, seed=seed, index=index, restarts=settings.restarts)


def region_vectors(
    backbone: Backbone, image: Tensor, segments: Tensor, method: Any, background: bool, kind: str = "deep"
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int64 [R], boxes int64 [R,4] (px of the image) and features float32 [R,D] of the regions of one picture.

    image [3,H,W], segments [h,w] over the whole of it. background: id 0 is a region like the others where this is
    False. kind `colour`: mean colours of the patches inside, whatever `method.regions.vectors` says.
    """
    settings = method.regions
    shifted = segments if background else segments + 1
    names, boxes = masks.region_boxes(shifted, settings.erode, settings.dilate)
    scale = torch.tensor([image.shape[2] / segments.shape[1], image.shape[1] / segments.shape[0]], device=image.device)
    boxes = (boxes * scale.repeat(2)).round().long()
    boxes[:, 2:] = torch.minimum(boxes[:, 2:], boxes.new_tensor([image.shape[2], image.shape[1]]))
    names = names if background else names - 1
    if kind == "deep" and settings.vectors == "crop":
        return names, boxes, crop_vectors(backbone, image, boxes)
    if kind == "colour":
        maps = small_pictures(image[None], tuple(segments.shape))
    else:
        maps = F.interpolate(
            patch_features(backbone, image[None], method.graph.features), segments.shape, mode="nearest"
        )
    inside = (segments == names[:, None, None]).flatten(1).float()
    return names, boxes, (inside @ maps[0].flatten(1).T) / inside.sum(1, keepdim=True).clamp(min=1)


def crop_vectors(backbone: Backbone, image: Tensor, boxes: Tensor) -> Tensor:
    """Features [R,C] of the boxes [R,4] of a picture [3,H,W], each a picture of its own: class tokens, else map means
    (also where the class token was not trained).

    Boxes of one shape go through the network together.
    """
    multiple = backbone.patch_multiple
    shapes: dict[tuple[int, int], list[int]] = {}
    for row, (left, top, right, bottom) in enumerate(boxes.tolist()):
        sides = (bottom - top) // multiple * multiple, (right - left) // multiple * multiple
        shapes.setdefault((max(sides[0], multiple), max(sides[1], multiple)), []).append(row)
    found: dict[int, Tensor] = {}
    for (height, width), rows in shapes.items():
        crops = []
        for left, top, _, _ in boxes[rows].tolist():
            top, left = min(top, image.shape[1] - height), min(left, image.shape[2] - width)
            crops.append(image[:, top : top + height, left : left + width])
        features = backbone.features(torch.stack(crops))
        vectors = features.cls if backbone.class_token else features.concat().mean((2, 3))
        found |= dict(zip(rows, vectors.float(), strict=True))
    return torch.stack([found[row] for row in range(len(boxes))]) if found else image.new_zeros(0, backbone.dim)


class Regions(MapStep):
    """Segments of every picture by its eigenvectors, and the features of its regions.

    Fields `segments` int16 [h,w], `names` int16 [R], `boxes` int32 [R,4] in px of what the network saw, `features`
    float32 [R,D]; dropped as `no_object` where nothing but background is there, and as the eigenvectors were.
    """

    counted = "names"

    def __init__(
        self, backbone: Backbone, cfg: Any, needs: str, background: bool, kind: str = "deep", name: str = "regions"
    ) -> None:
        super().__init__(backbone)
        self.name, self.needs, self.kind, self.background = name, (needs,), kind, background
        self.method, self.seed, self.interpolation = cfg.method, int(cfg.seed), cfg.data.interpolation

    def settings(self) -> dict[str, Any]:
        own = {"segments": dict(self.method.segments), "regions": dict(self.method.regions) | {"pca": None}}
        own |= {"seed": self.seed, "background": self.background, "kind": self.kind}
        return own | {"class_token": self.backbone.class_token}

    def geometry(self) -> Geometry:
        return stage_geometry(self.method.stage, self.interpolation)

    def record_bytes(self) -> int:
        cells = stage_cells(self.method.stage, self) * self.method.graph.scale**2
        return 2 * cells + self.method.segments.count * (18 + 4 * self.backbone.dim) + 1500

    def begin(self, results: Results) -> None:
        self.eigenvectors = results[self.needs[0]]

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images, found = whole_patches(batch, patch_of(self.backbone)), []
        for row, image in enumerate(images):
            index = int(batch["index"][row])
            read = self.eigenvectors.read(index)
            if not read.keep:
                found.append(new_record(batch, row, images, read.grid))
                found[-1].drop = read.drop
                continue
            values, vectors = (
                torch.from_numpy(read.fields[name]).to(image.device).float() for name in ("eigenvalues", "eigenvectors")
            )
            segments = segment(values, vectors, self.method.segments, self.seed, index)
            names, boxes, features = region_vectors(
                self.backbone, image, segments, self.method, self.background, self.kind
            )
            fields = {"segments": segments.short(), "names": names.short(), "boxes": boxes.int(), "features": features}
            found.append(new_record(batch, row, images, tuple(segments.shape), **fields))
            found[-1].drop = "" if len(names) else "no_object"
        return found


class Clusters(ReduceStep):
    """k-means of the features of all regions: `mean`, `axes`, `centroids` (`spectral.RegionSpace`), and `assignment`
    int64 [R], the cluster from 0 of every row of `names` over all kept pictures."""

    def __init__(self, cfg: Any, count: int, needs: str = "regions", name: str = "clusters") -> None:
        self.name, self.needs = name, (needs,)
        self.count, self.components, self.seed = count, int(cfg.method.regions.pca), int(cfg.seed)

    def settings(self) -> dict[str, Any]:
        return {"count": self.count, "pca": self.components, "seed": self.seed}

    def table(self, results: Results, device: torch.device) -> dict[str, Tensor | np.ndarray]:
        vectors = torch.from_numpy(results[self.needs[0]].rows("features")[0]).to(device)
        if len(vectors) < self.count:
            raise ConfigError(
                f"method.num_clusters: the {len(vectors)} regions of the training pictures do not make {self.count} "
                "clusters; lower it, raise method.segments.count, or give more pictures"
            )
        space = spectral.region_space(vectors, self.count, seed=self.seed, components=self.components)
        fields = {"mean": space.mean, "axes": space.axes, "centroids": space.centroids}
        return fields | {"assignment": space.assign(vectors)}


def region_maps(
    backbone: Backbone, images: Tensor, method: Any, seed: int, space: spectral.RegionSpace, background: bool,
    kind: str = "deep", valid: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Class maps int64 [B,h,w] of pictures that no stage has seen: regions by their eigenvectors, each with its nearest
    cluster (+ 1 beside a background). Starts of k-means are those of picture 0.

    valid: bool [B,H,W], false on padding; a picture is cut as it is without it, and padding takes the classes beside.
    """
    if valid is not None:
        extents, own = own_extents(valid, backbone.patch_multiple), {}
        for extent in extents:
            maps = region_maps(backbone, extent.cut(images), method, seed, space, background, kind)
            own |= dict(zip(extent.rows, maps, strict=True))
        return padded_maps(own, extents, tuple(images.shape[-2:]))
    found, size = graph_vectors(backbone, images, kind, method.graph, method.eigs)
    maps = []
    for image, values, vectors in zip(images, found.values.float(), found.vectors.float(), strict=True):
        segments = segment(values, vectors.unflatten(1, size), method.segments, seed, 0)
        names, _, features = region_vectors(backbone, image, segments, method, background, kind)
        classes = space.assign(features) + int(background) if len(names) else names
        table = torch.zeros(int(segments.max()) + 1, dtype=torch.int64, device=image.device)
        table[names] = classes
        maps.append(table[segments])
    return torch.stack(maps)
