"""What SegSort and HSG share: windows of pictures, a head that gives every cell a vector, and the cells' segments."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from common.spec import OUTSIDE, Geometric, Photometric, RegionSpec, ViewSpec
from grouping.gathered import GatheredSegments, gather_segments
from grouping.segments import Segments, at_cells, sort_pixels, sorting
from lightning_modules.base import UnsupervisedSegmenter
from lightning_modules.base.regions import region_spec
from models.backbone import Features
from models.pixel_heads import pixel_head

PICTURE = 1 << 32
"""Region ids lie below it, so that picture * PICTURE + region tells the regions of all pictures apart."""


@dataclass(frozen=True)
class Cells:
    """The cells of all views of a batch of this rank; the views of a picture are neighbours."""

    codes: Tensor
    """[B*V,D,h,w], with gradient, not normalised."""
    valid: Tensor
    """bool [B*V,h,w], false on padding and where no region is."""
    regions: Tensor | None
    """int64 [B*V,h,w], contour regions; None without."""


class PixelSorter(UnsupervisedSegmenter):
    """Codes = head(features), dense; probes read them. Trained: the head and, unless it is frozen, the backbone."""

    trains_backbone = None
    wants_features = False

    def build(self) -> None:
        settings = self.cfg.method
        self.sorting = sorting(settings.kmeans, "method.kmeans")
        self.regions = None if settings.regions.source == "none" else region_spec(settings.regions)
        self.cell_pixel = settings.cell_pixel
        if (
            self.cell_pixel == "auto"
        ):  # a stride padded on one side alone (TensorFlow's `same`) moves cells past the centre
            around_corner = not self.backbone.transformer and self.cfg.backbone.pad_type != "same"
            self.cell_pixel = "corner" if around_corner else "centre"
        self.code_dim = settings.dim
        self.head = pixel_head(dim=settings.dim, in_dim=self.backbone.dim, **settings.head)

    @property
    def region_maps(self) -> RegionSpec | None:
        return self.regions

    @property
    def views(self) -> dict[str, ViewSpec]:
        """`method.views` windows of every picture, scaled, mirrored and coloured independently."""
        crop = self.cfg.method.crop
        spec = ViewSpec(
            photometric=Photometric(**self.cfg.method.augment, blur_p=0.0),
            geometric=Geometric(size=crop.size, zoom=tuple(crop.zoom), flip_p=crop.flip_p),
        )
        return {f"view{number}": spec for number in range(self.cfg.method.views)}

    def trained_parts(self) -> dict[str, nn.Module]:
        """What is trained, by the name of its optimiser group."""
        return {"head": self.head} if self.backbone.frozen else {"backbone": self.backbone, "head": self.head}

    def param_groups(self) -> list[dict[str, Any]]:
        """Of every part only matrices and kernels are decayed, and biases may learn faster."""
        groups = []
        for name, part in self.trained_parts().items():
            trained = [(key, value) for key, value in part.named_parameters() if value.requires_grad]
            faster = self.cfg.optim[name].lr * self.cfg.method.bias_lr
            biases = [value for key, value in trained if key.endswith("bias")]
            scales = [value for key, value in trained if value.dim() <= 1 and not key.endswith("bias")]
            kernels = [value for key, value in trained if value.dim() > 1 and not key.endswith("bias")]
            free = {"weight_decay": 0.0}
            found = [{"params": kernels}, {"params": scales, **free}, {"params": biases, "lr": faster, **free}]
            groups += [{"name": name, **group} for group in found if group["params"]]
        return groups

    def embed(self, features: Features) -> Tensor:
        return self.head(features.concat())

    def cells(self, views: dict[str, Any]) -> Cells:
        """The cells of all views of a batch."""
        names = list(self.views)
        codes = self.embed(self.features(adjacent(views, names)))
        size, regions = tuple(codes.shape[-2:]), None
        valid = self.at_cells(views, ".valid", size)
        if self.regions is not None:
            regions = self.at_cells(views, ".regions", size)
            valid = valid & (regions != OUTSIDE)
        return Cells(codes, valid, regions)

    def at_cells(self, views: dict[str, Any], what: str, size: tuple[int, int]) -> Tensor:
        """A map of all views of a batch (`.valid`, `.regions`, `.label`) at h x w cells: [B*V,h,w]."""
        return at_cells(adjacent(views, list(self.views), what), size, self.cell_pixel)

    def region_keys(self, views: dict[str, Any], regions: Tensor) -> Tensor:
        """Contour regions [B*V,h,w] as keys that tell the regions of all pictures apart, and agree between views."""
        return views["index"].repeat_interleave(len(self.views))[:, None, None] * PICTURE + regions

    def sort(self, codes: Tensor, cut: Tensor | None, valid: Tensor) -> tuple[Segments, GatheredSegments]:
        """The segments of cells, cut by ids [B*V,h,w], and those of all ranks that are reached. A collective."""
        found = sort_pixels(codes, **self.sorting, regions=cut, valid=valid)
        return found, gather_segments(found.unit.flatten(0, 1), found.ids.flatten(), found.counts, self.reach)


def adjacent(views: dict[str, Any], names: list[str], what: str = "") -> Tensor:
    """Some views of a batch (or a map of them, `.valid`) as one batch, in which the views of a picture are neighbours:
    so the order of several ranks is that of one process."""
    return torch.stack([views[f"{name}{what}"] for name in names], dim=1).flatten(0, 1)
