"""SegSort (Hwang et al., "SegSort: Segmentation by Discriminative Sorting of Segments", ICCV 2019).

A network gives every cell a unit vector. Cells are sorted into segments inside each picture: by contour regions, by
spherical k-means from a grid, or both; a segment's prototype is the normalised sum of its cells. The loss draws cells
to the prototype of their own segment, away from all others of the batch (von Mises-Fisher), or to the other segments of
their label (vMF-NCA). Labels are contour regions, which show in several views of a picture; in the supervised variant
they are classes: it reads the labels of the data, and says so everywhere.
"""

from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.errors import ConfigError, one_of
from common.spec import IGNORE, OUTSIDE, Geometric, Photometric, RegionSpec, ViewSpec
from grouping.gathered import GatheredSegments, gather_segments
from grouping.segments import at_cells, sort_pixels, sorting
from lightning_modules.base import Loss, UnsupervisedSegmenter
from lightning_modules.regions import region_spec
from losses.vmf import MAX_KAPPA, vmf, vmf_nca
from models.backbone import Features
from models.pixel_heads import pixel_head
from retrieval.memory import MemoryBank

LOSSES = ("vmf", "vmf_nca")
PICTURE = 1 << 32
"""Region ids lie below it, so that picture * PICTURE + region tells the regions of all pictures apart."""


class SegSort(UnsupervisedSegmenter):
    """Codes = head(features), dense; probes read them. Trained: the head and, unless it is frozen, the backbone."""

    trains_backbone = None
    wants_features = False

    def build(self) -> None:
        settings = self.cfg.method
        check_settings(settings)
        self.sorting = sorting(settings.kmeans, "method.kmeans")
        self.uses_labels = settings.labels.enabled
        if self.uses_labels and not self.meta.has_labels:
            raise ConfigError(
                "method.labels.enabled=true: the supervised variant learns from labels and the data has none; "
                "set method.labels.enabled=false"
            )
        self.regions = None if settings.regions.source == "none" else region_spec(settings.regions)
        self.code_dim = settings.dim
        self.head = pixel_head(dim=settings.dim, in_dim=self.backbone.dim, **settings.head)
        self.memory, self.fresh = None, None
        if self.uses_labels and settings.labels.banks:
            rows, columns = settings.kmeans.cells
            size = settings.labels.banks * rows * columns * self.cfg.data.batch_size * settings.views
            self.memory = MemoryBank(size, settings.dim, extras={"label": ((), torch.int64)})

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

    def param_groups(self) -> list[dict[str, Any]]:
        """Backbone and head; only matrices and kernels are decayed, biases may learn faster."""
        parts = {"head": self.head} if self.backbone.frozen else {"backbone": self.backbone, "head": self.head}
        groups = []
        for name, part in parts.items():
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

    # ------------------------------------------------------------------ one step

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """Method document section 4, on the cells of all views of the batch of all ranks."""
        settings, names = self.cfg.method, list(self.views)
        codes = self.embed(self.features(adjacent(views, names)))
        size = tuple(codes.shape[-2:])
        valid = at_cells(adjacent(views, names, ".valid"), size)
        cut = keys = None
        if self.regions is not None:
            cut = at_cells(adjacent(views, names, ".regions"), size)
            valid = valid & (cut != OUTSIDE)
        if self.uses_labels:
            keys = at_cells(adjacent(views, names, ".label"), size)
            valid = valid & (keys != IGNORE)
            cut = keys if cut is None else cut * (IGNORE + 1) + keys  # a segment has one class and one region
        elif settings.loss == "vmf_nca":
            keys = views["index"].repeat_interleave(len(names))[:, None, None] * PICTURE + cut
        found = sort_pixels(codes, **self.sorting, regions=cut, valid=valid)
        pixels, ids = found.unit.flatten(0, 1), found.ids.flatten()
        table = gather_segments(pixels, ids, found.counts, self.reach)
        loss = self._contrast(pixels, table, keys) * table.share
        empty = ~table.present.any()
        parts = {"segments": table.present.sum() / (len(codes) * distributed.world_size())}
        return Loss(loss, {"vmf": loss.detach(), **parts}, skip=empty, codes=codes[:: len(names)], view=names[0])

    def _contrast(self, pixels: Tensor, table: GatheredSegments, keys: Tensor | None) -> Tensor:
        settings = self.cfg.method
        if settings.loss == "vmf":
            return vmf(pixels, table.prototypes, table.own, settings.kappa, present=table.present)
        labels = table.values(keys.flatten())
        memory = None
        if self.memory is not None:
            memory = self.memory.rows().clone(), self.memory.rows("label").clone()
            kept = table.mine, table.present[table.mine]
            self.fresh = table.prototypes.detach()[kept[0]][kept[1]], labels[kept[0]][kept[1]]
        return vmf_nca(pixels, table.prototypes, labels, table.own, settings.kappa, memory=memory)

    def after_step(self) -> None:
        """The prototypes of this step come into the memory after the optimiser's step, unless the step was skipped."""
        if self.fresh is not None and not self.optimizers().optimizer.skip_method:
            self.memory.enqueue(self.fresh[0], label=self.fresh[1])
        self.fresh = None


def adjacent(views: dict[str, Any], names: list[str], what: str = "") -> Tensor:
    """Some views of a batch (or a map of them, `.valid`) as one batch, in which the views of a picture are neighbours:
    so the order of several ranks is that of one process."""
    return torch.stack([views[f"{name}{what}"] for name in names], dim=1).flatten(0, 1)


def check_settings(settings: Any) -> None:
    """Raises ConfigError for values that the method cannot run with."""
    kmeans, labels, contours = settings.kmeans, settings.labels.enabled, settings.regions.source != "none"
    one_of("method.loss", settings.loss, LOSSES)
    if labels and settings.loss == "vmf":
        raise ConfigError(
            "method.loss=vmf: draws nothing by class, so method.labels.enabled=true would change nothing but the "
            "segments; set method.loss=vmf_nca"
        )
    if settings.loss == "vmf_nca" and not labels and not contours:
        raise ConfigError(
            "method.regions.source=none: method.loss=vmf_nca needs a label of each segment; choose a source of "
            "regions, method.loss=vmf, or method.labels.enabled=true"
        )
    if not contours and not labels and tuple(kmeans.cells) == (1, 1):
        raise ConfigError(
            "method.kmeans.cells=[1, 1]: without regions a picture would be one segment; set method.kmeans.cells=[5,5] "
            "or choose a source of regions"
        )
    if not 0 < settings.kappa <= MAX_KAPPA:
        raise ConfigError(f"method.kappa={settings.kappa:g}: must be above 0 and at most {MAX_KAPPA:g}")
    if settings.views < 1:
        raise ConfigError(f"method.views={settings.views}: must be at least 1")
    zoom = list(settings.crop.zoom)
    if len(zoom) != 2 or not 0 < zoom[0] <= zoom[1]:
        raise ConfigError(f"method.crop.zoom={zoom}: expected two factors above 0, the smaller first, as [0.5,2.0]")
    if settings.crop.size is not None and settings.crop.size < 1:
        raise ConfigError(f"method.crop.size={settings.crop.size}: must be at least 1")
    for name, value in (
        ("kmeans.iterations", kmeans.iterations),
        ("kmeans.location_scale", kmeans.location_scale),
        ("labels.banks", settings.labels.banks),
        ("bias_lr", settings.bias_lr),
    ):
        if value < 0:
            raise ConfigError(f"method.{name}={value:g}: must not be negative")
    shares = {f"augment.{name}": value for name, value in settings.augment.items() if name != "hue"}
    for name, value in (shares | {"crop.flip_p": settings.crop.flip_p}).items():
        if not 0 <= value <= 1:
            raise ConfigError(f"method.{name}={value:g}: expected a number from 0 to 1")
    if not 0 <= settings.augment.hue <= 0.5:
        raise ConfigError(f"method.augment.hue={settings.augment.hue:g}: expected a number from 0 to 0.5")
