"""SegSort (Hwang et al., ICCV 2019): vectors of pixels drawn to their own segments and away from all others.

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
from common.errors import ConfigError
from common.spec import IGNORE
from grouping.gathered import GatheredSegments
from lightning_modules.base import Loss
from lightning_modules.families.pixel_sorting import PixelSorter
from losses.vmf import vmf, vmf_nca
from models.backbone import Features
from retrieval.memory import MemoryBank


class SegSort(PixelSorter):
    """Codes = head(features), dense; probes read them. Trained: the head and, unless it is frozen, the backbone."""

    title = "SegSort"

    def build(self) -> None:
        settings = self.cfg.method
        self.uses_labels = settings.labels.enabled
        if self.uses_labels and not self.meta.has_labels:
            raise ConfigError(
                "method.labels.enabled=true: the supervised variant learns from labels and the data has none; "
                "set method.labels.enabled=false"
            )
        super().build()
        check_settings(settings)
        self.memory, self.fresh = None, None
        if self.uses_labels and settings.labels.banks:
            rows, columns = settings.kmeans.cells
            size = settings.labels.banks * rows * columns * self.cfg.data.batch_size * settings.views
            self.memory = MemoryBank(size, settings.dim, extras={"label": ((), torch.int64)})

    def loss(self, views: dict[str, Any], features: Features | None) -> Loss:
        """The losses of `losses/vmf.py`, on the cells of all views of the batch of all ranks."""
        names, cells = list(self.views), self.cells(views)
        valid, cut, keys = cells.valid, cells.regions, None
        if self.uses_labels:
            keys = self.at_cells(views, ".label", tuple(cells.codes.shape[-2:]))
            valid = valid & (keys != IGNORE)
            cut = keys if cut is None else cut * (IGNORE + 1) + keys  # a segment has one class and one region
        elif self.cfg.method.loss == "vmf_nca":
            keys = self.region_keys(views, cut)
        found, table = self.sort(cells.codes, cut, valid)
        loss = self._contrast(found.unit.flatten(0, 1), table, keys) * table.share
        empty = ~table.present.any()
        parts = {"segments": table.present.sum() / (len(cells.codes) * distributed.world_size())}
        codes = cells.codes[:: len(names)]
        return Loss(loss, {"vmf": loss.detach(), **parts}, skip=empty, codes=codes, view=names[0])

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


def check_settings(settings: Any) -> None:
    """Raises ConfigError for values that do not go together; what each may be stands in the method's yaml."""
    kmeans, labels, contours = settings.kmeans, settings.labels.enabled, settings.regions.source != "none"
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
