"""Steps of TransFGU's offline stage behind its crops: concepts by k-means, maps of all concepts of every picture.

Source: Yin et al., TransFGU (ECCV 2022). B pictures, K concepts, D channels of a
token, h x w patches.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import ConfigError
from common.precision import exact
from datamodules.base.transforms import Geometry, both_sides
from grouping.concepts import class_row_gradient, concept_maps
from grouping.segments import segment_means
from lightning_modules.families.graph_cuts import patch_of
from lightning_modules.transfgu.crops import FOREGROUND, stage_geometry
from models.backbone import Backbone
from models.class_token import ClassPath, class_path
from pseudo_labels.cache import Record, Records
from pseudo_labels.steps import MapStep, ReduceStep, Results, new_record
from pseudo_labels.views import View
from retrieval import kmeans

FINE = 8
"""Places a patch and axis that `Places` tells apart."""

# Concepts.


class Concepts(ReduceStep):
    """`centroids` float32 [K,D]: means of the tokens of each cluster, those of the foreground's bank first.

    counts: clusters of each bank, by its kind. token: of `token_kind`. Class tokens come from a norm and have nearly
    one length; that of a pooled token mostly says how much there is in a crop. Lloyd's iterations over all tokens,
    which are in memory at once; the release takes mini-batches for Cityscapes and LIP.
    """

    name = "concepts"
    needs = ("crops",)

    def __init__(self, cfg: Any, counts: dict[int, int], token: str) -> None:
        self.counts, self.kmeans, self.seed = counts, cfg.method.kmeans, int(cfg.seed)
        self.length = resolved(self.kmeans.length, token, "raw", "unit")

    def settings(self) -> dict[str, Any]:
        banks = {str(kind): count for kind, count in self.counts.items()}
        return {"banks": banks, "kmeans": dict(self.kmeans) | {"length": self.length}, "seed": self.seed}

    def table(self, results: Results, device: torch.device) -> dict[str, Tensor | np.ndarray]:
        features, kinds = (results["crops"].rows(name)[0] for name in ("features", "kinds"))
        found, sizes = [], []
        for kind, count in self.counts.items():
            points = torch.from_numpy(features[kinds == kind]).to(device)
            points = F.normalize(points, dim=1) if self.length == "unit" else points
            if len(points) < count:
                what = "foreground" if kind == FOREGROUND else "background"
                raise ConfigError(
                    f"method.num_clusters: the {len(points)} {what} crops do not make {count} concepts; lower it, "
                    "raise method.crops.max_per_image, or give more pictures"
                )
            settings = {"iterations": self.kmeans.iterations, "restarts": self.kmeans.restarts, "seed": self.seed}
            fitted = kmeans.fit(points, count, spherical=False, **settings)
            labels = kmeans.assign(points, fitted.centroids, spherical=False)
            members = torch.bincount(labels, minlength=count)
            means = segment_means(points, labels, count)
            found.append(torch.where(members[:, None] > 0, means, fitted.centroids))  # the release gives NaN
            sizes.append(members)
        return {"centroids": torch.cat(found), "members": torch.cat(sizes)}


# Maps of the concepts.


class ConceptMaps(MapStep):
    """`class_map` float16 [K,h,w]: where a picture supports each concept. All concepts from one forward pass."""

    name = "maps"
    needs = ("concepts",)

    def __init__(self, backbone: Backbone, cfg: Any, concepts: int, token: str) -> None:
        super().__init__(backbone)
        self.cfg, self.maps, self.concepts, self.token = cfg, cfg.method.maps, concepts, token
        self.power = float(resolved(self.maps.power, token, 1, 0))

    def settings(self) -> dict[str, Any]:
        own = {"share": self.maps.share, "divisor": self.maps.divisor}
        return own | {"token": self.token, "power": self.power}

    def geometry(self) -> Geometry:
        return stage_geometry(self.cfg, both_sides(self.cfg.method.stage.size))

    def record_bytes(self) -> int:
        patch = patch_of(self.backbone)
        height, width = (-(-side // patch) for side in both_sides(self.cfg.method.stage.size))
        return 2 * self.concepts * height * width + 1000

    def begin(self, results: Results) -> None:
        device = next(self.backbone.parameters()).device
        self.centroids = torch.from_numpy(results["concepts"]["centroids"]).to(device)

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = batch["image"]
        path = class_path(self.backbone, images, self.token)
        maps = maps_of(path, self.centroids, self.maps.divisor, self.maps.share, self.power).half()
        return [new_record(batch, row, images, path.grid, class_map=found) for row, found in enumerate(maps)]


def maps_of(path: ClassPath, centroids: Tensor, divisor: int, share: float, power: float = 1.0) -> Tensor:
    """Concept maps float32 [B,K,h,w] of pictures by their class path; see grouping/concepts.py."""
    gradient = class_row_gradient(path.attention, path.values, centroids, path.token, divisor, power)
    row = torch.cat([path.attention[:, :, :1], path.attention[:, :, path.prefix :]], 2)  # registers have no place
    return concept_maps(row, gradient[:, :, path.prefix - 1 :], share).unflatten(2, path.grid)


# Maps in a training batch.


class Places(View):
    """Where in the grid of `class_map` a pixel lies, as a label map that goes through any geometry: `OFFSET` + number
    of the place, row by row, FINE places to a patch and axis. IGNORE where there is no map."""

    OFFSET = 256

    def __init__(self, records: Records) -> None:
        super().__init__(records, ())

    def labels(self, record: Record) -> np.ndarray:
        height, width = (FINE * side for side in record.grid)
        return self.OFFSET + np.arange(height * width).reshape(height, width)


def maps_at(maps: Tensor, places: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps [K,h,w] as a view of the picture sees them: the mean over every cell of a grid of `size`, [K,h',w'] float32.

    places: int64 [H,W] of `Places`, cut and mirrored like the view. Each pixel samples bilinearly, as RoIAlign does;
    a cell without a pixel of the picture is 0.
    """
    height, width = maps.shape[1:]
    known = places >= Places.OFFSET
    number = (places - Places.OFFSET).clamp(min=0)
    y = ((number // (width * FINE) + 0.5) / FINE - 0.5).clamp(0, height - 1)
    x = ((number % (width * FINE) + 0.5) / FINE - 0.5).clamp(0, width - 1)
    top, left = y.long(), x.long()
    rows, columns = (
        torch.arange(pixels, device=places.device) * cells // pixels
        for pixels, cells in zip(places.shape, size, strict=True)
    )
    cell = (rows[:, None] * size[1] + columns)[known]
    weights = maps.new_zeros(size[0] * size[1], height * width, dtype=torch.float32)
    for down in (0, 1):
        for right in (0, 1):
            share = (y - top if down else 1 - (y - top)) * (x - left if right else 1 - (x - left))
            at = (top + down).clamp(max=height - 1) * width + (left + right).clamp(max=width - 1)
            # Sums of multiples of 1/256 are exact, so their order does not matter.
            weights.view(-1).index_add_(0, cell * (height * width) + at[known], share[known])
    weights = weights / torch.bincount(cell, minlength=len(weights)).clamp(min=1)[:, None]
    with exact(maps.device):
        return (maps.float().flatten(1) @ weights.T).unflatten(1, size)


def resolved(wanted: Any, token: str, of_class: Any, of_pooled: Any) -> Any:
    """`wanted`, or where it is `auto` what the kind of token asks for."""
    return wanted if wanted != "auto" else of_class if token == "class" else of_pooled
