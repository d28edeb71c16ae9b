"""Steps of TransFGU's offline stage: class tokens of crops, concepts by k-means, maps of all concepts of every picture.

Source: Yin et al., TransFGU (ECCV 2022); method document transfgu.md 3 to 5. B pictures, R crops of a picture, K
concepts, D channels of a token, h x w patches.
"""

import logging
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import chance
from common.errors import ConfigError, one_of
from common.precision import exact
from datamodules.transforms import Geometry
from grouping.concepts import class_row_gradient, concept_maps
from grouping.segments import segment_means
from grouping.windows import crop_boxes
from lightning_modules.graph_cuts import patch_of
from models.backbone import Backbone
from models.class_token import ClassPath, class_path, token_width, tokens
from pseudo_labels.cache import Record, Records
from pseudo_labels.steps import MapStep, ReduceStep, Results, new_record
from pseudo_labels.views import View
from retrieval import kmeans

log = logging.getLogger(__name__)

BANKS = ("auto", "all", "foreground", "split")
"""Which crops are clustered: all of them, those on the foreground, or foreground and background each by themselves."""
FOREGROUND, BACKGROUND = 1, 0
"""Kinds of crops; where they are not told apart all are FOREGROUND."""
FINE = 8
"""Places a patch and axis that `Places` tells apart."""


def stage_sides(settings: Any) -> tuple[int, int]:
    """H and W, px, of pictures in the stage."""
    return (settings.size, settings.size) if isinstance(settings.size, int) else tuple(settings.size)


# Crops and their class tokens.


class Crops(MapStep):
    """Fields `features` float32 [R,D] (class tokens, as they are), `boxes` int32 [R,4] (y0 x0 y1 x1, exclusive, px of
    what the network saw) and `kinds` int8 [R]; dropped as `no_crop` where no window belongs to a bank.

    banks: `all`, `foreground` or `split`. Without `all` a window is foreground where more than `foreground` of its
    pixels are (attention of the class token above its mean), background where more than `background` of them are not,
    and left out else. No window is encoded twice: windows of several scales that are the same count once.
    """

    name = "crops"
    counted = "features"

    def __init__(self, backbone: Backbone, cfg: Any, banks: str, token: str) -> None:
        super().__init__(backbone)
        self.cfg, self.crops, self.stage = cfg, cfg.method.crops, cfg.method.stage
        self.banks, self.token, self.seed = banks, token, int(cfg.seed)
        self.sides = tuple(self.crops.zoom * side for side in stage_sides(self.stage))
        self.side = self.crops.size or min(stage_sides(self.stage))
        patch = patch_of(backbone)
        self.grid = tuple(-(-side // patch) for side in self.sides)
        boxes, _ = crop_boxes(*self.grid, list(self.crops.scales))
        self.windows = list(dict.fromkeys(map(tuple, boxes.tolist())))

    @property
    def most(self) -> int:
        """R at most."""
        return min(len(self.windows), self.crops.max_per_image or len(self.windows))

    def settings(self) -> dict[str, Any]:
        own = {name: self.crops[name] for name in ("zoom", "foreground", "background", "max_per_image", "pictures")}
        drawn = self.most < len(self.windows) or self.crops.pictures is not None
        own |= {"banks": self.banks, "token": self.token, "side": self.side, "scales": list(self.crops.scales)}
        return own | {"passes": self.crops.batch_size, "seed": self.seed if drawn else None}

    def geometry(self) -> Geometry:
        return Geometry(self.sides, "none", self.cfg.data.interpolation)

    def record_bytes(self) -> int:
        return self.most * (4 * token_width(self.backbone, self.token) + 17) + 1000

    def pictures(self, count: int) -> list[int]:
        most = self.crops.pictures
        if most is None or most >= count:
            return list(range(count))
        draw = chance.numpy_generator(self.seed, "transfgu.pictures")
        return sorted(draw.permutation(count)[:most].tolist())

    def announce(self, count: int) -> str:
        whole = 0 if self.banks == "all" else count
        patches = -(-self.side // patch_of(self.backbone))
        weights = sum(value.numel() for value in self.backbone.parameters())
        work = 2.0 * weights * patches**2 * self.most * count / 1e12
        return (
            f"at most {self.most * count} crops of {self.side} px ({self.most} of the {len(self.windows)} windows of "
            f"each of {count} pictures) and {whole} whole pictures go through the backbone, about {work:.3g} TFLOP; "
            "method.crops.max_per_image and method.crops.pictures bound it"
        )

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images, found = batch["image"], []
        masks = None if self.banks == "all" else foreground(class_path(self.backbone, images, self.token))
        for row, image in enumerate(images):
            boxes, kinds = self.chosen(None if masks is None else masks[row], int(batch["index"][row]))
            features = self.encode(image, boxes)
            fields = {"features": features, "boxes": boxes.int(), "kinds": kinds.to(torch.int8)}
            found.append(new_record(batch, row, images, self.grid, **fields))
            found[-1].drop = "" if len(boxes) else "no_crop"
        return found

    def chosen(self, mask: Tensor | None, index: int) -> tuple[Tensor, Tensor]:
        """Boxes int64 [R,4] in px and kinds int64 [R] of a picture; mask: foreground bool [h,w]."""
        patch = patch_of(self.backbone)
        boxes = torch.tensor(self.windows) * patch
        # Both ends of a window are patches inside it. The last row and column of pixels is left out, as released.
        boxes[:, 2:] = torch.minimum(boxes[:, 2:] + patch, torch.tensor(self.sides)) - 1
        kinds = torch.full((len(boxes),), FOREGROUND)
        if mask is not None:
            shares = box_shares(mask.cpu(), boxes, self.sides)
            fore, back = shares > self.crops.foreground, 1 - shares > self.crops.background
            kinds = torch.where(fore, FOREGROUND, BACKGROUND)
            kept = fore if self.banks == "foreground" else fore | back
            boxes, kinds = boxes[kept], kinds[kept]
        if len(boxes) > self.most:
            draw = chance.numpy_generator(self.seed, "transfgu.crops", index)
            rows = np.sort(draw.permutation(len(boxes))[: self.most])
            boxes, kinds = boxes[rows], kinds[rows]
        return boxes, kinds

    def encode(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Tokens [R,D] of boxes of a picture [3,H,W], each as a square picture of its own."""
        found = [image.new_zeros(0, token_width(self.backbone, self.token))]
        for part in boxes.split(self.crops.batch_size):  # of one picture alone: a record depends on no other
            crops = [image[None, :, y0:y1, x0:x1] for y0, x0, y1, x1 in part.tolist()]
            size = (self.side, self.side)
            crops = [F.interpolate(crop, size, mode="bilinear", align_corners=False) for crop in crops]
            found.append(tokens(self.backbone, torch.cat(crops), self.token))
        return torch.cat(found)


def foreground(path: ClassPath) -> Tensor:
    """Patches whose attention is above the picture's mean: bool [B,h,w]."""
    attention = path.patch_attention
    return attention > attention.mean((1, 2), keepdim=True)


def box_shares(mask: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Share of the pixels of each box [R,4] (y0 x0 y1 x1, exclusive) that a mask [h,w] covers, enlarged to `size`."""
    pixels = F.interpolate(mask[None, None].double(), size, mode="nearest")[0, 0]
    sums = F.pad(pixels.cumsum(0).cumsum(1), (1, 0, 1, 0))
    y0, x0, y1, x1 = boxes.T
    inside = sums[y1, x1] - sums[y0, x1] - sums[y1, x0] + sums[y0, x0]
    return inside / ((y1 - y0) * (x1 - x0))


# Concepts.


class Concepts(ReduceStep):
    """`centroids` float32 [K,D]: means of the tokens of each cluster, those of the foreground's bank first.

    counts: clusters of each bank, by its kind. Lloyd's iterations over all tokens, which are in memory at once; the
    release takes mini-batches for Cityscapes and LIP.
    """

    name = "concepts"
    needs = ("crops",)

    def __init__(self, cfg: Any, counts: dict[int, int]) -> None:
        self.counts, self.kmeans, self.seed = counts, cfg.method.kmeans, int(cfg.seed)

    def settings(self) -> dict[str, Any]:
        banks = {str(kind): count for kind, count in self.counts.items()}
        return {"banks": banks, "kmeans": dict(self.kmeans), "seed": self.seed}

    def table(self, results: Results, device: torch.device) -> dict[str, Tensor | np.ndarray]:
        features, kinds = (results["crops"].rows(name)[0] for name in ("features", "kinds"))
        found, sizes = [], []
        for kind, count in self.counts.items():
            points = torch.from_numpy(features[kinds == kind]).to(device)
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

    def settings(self) -> dict[str, Any]:
        return {"share": self.maps.share, "divisor": self.maps.divisor, "token": self.token}

    def geometry(self) -> Geometry:
        return Geometry(stage_sides(self.cfg.method.stage), "none", self.cfg.data.interpolation)

    def record_bytes(self) -> int:
        patch = patch_of(self.backbone)
        height, width = (-(-side // patch) for side in stage_sides(self.cfg.method.stage))
        return 2 * self.concepts * height * width + 1000

    def begin(self, results: Results) -> None:
        device = next(self.backbone.parameters()).device
        self.centroids = torch.from_numpy(results["concepts"]["centroids"]).to(device)

    def records(self, batch: dict[str, Any]) -> list[Record]:
        images = batch["image"]
        path = class_path(self.backbone, images, self.token)
        maps = maps_of(path, self.centroids, self.maps.divisor, self.maps.share).half()
        return [new_record(batch, row, images, path.grid, class_map=found) for row, found in enumerate(maps)]


def maps_of(path: ClassPath, centroids: Tensor, divisor: int, share: float) -> Tensor:
    """Concept maps float32 [B,K,h,w] of pictures by their class path; see grouping/concepts.py."""
    gradient = class_row_gradient(path.attention, path.values, centroids, path.token, divisor)
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


def check_crops(settings: Any) -> None:
    """Raises ConfigError for values of `method.{banks,crops,kmeans,maps}` that cannot be run with."""
    one_of("method.banks", settings.banks, BANKS)
    crops, maps = settings.crops, settings.maps
    positive = {
        "crops.size": crops.size, "crops.zoom": crops.zoom, "crops.batch_size": crops.batch_size,
        "maps.divisor": maps.divisor,
        "crops.max_per_image": crops.max_per_image, "crops.pictures": crops.pictures,
        "kmeans.iterations": settings.kmeans.iterations, "kmeans.restarts": settings.kmeans.restarts,
    }  # fmt: skip
    for name, value in positive.items():
        if value is not None and value < 1:
            raise ConfigError(f"method.{name}={value}: must be at least 1")
    for name, value in (("crops.foreground", crops.foreground), ("crops.background", crops.background)):
        if not 0 <= value < 1:
            raise ConfigError(f"method.{name}={value:g}: expected a share from 0 to below 1")
    if not 0 < maps.share <= 1:
        raise ConfigError(f"method.maps.share={maps.share:g}: expected a share above 0, at most 1")
