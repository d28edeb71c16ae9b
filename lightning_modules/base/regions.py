"""Contour regions of the training pictures for a method that wants them: read from a folder, or computed once."""

from typing import Any

from common.files import cache_folder
from common.spec import RegionSpec
from datamodules.base import regions
from datamodules.base.sampling import worker_count
from grouping.regions import check_spec, over_segment
from lightning_modules.base.asked import Asked


def region_spec(settings: Any) -> RegionSpec:
    """The keys `method.regions.*`, checked. Raises ConfigError."""
    spec = RegionSpec(**{**settings, "thresholds": tuple(settings.thresholds)})
    check_spec(spec)
    return spec


def region_files(method: Asked, data: Any, spec: RegionSpec) -> regions.RegionFiles:
    """The region files of the training pictures of a DataModule; a collective. Raises ConfigError, DataError."""
    source = data.source("train")
    if spec.source == "folder":
        return regions.given(source, spec.root, method.region_key)
    folder = cache_folder(method.cfg) / "regions"
    workers = worker_count(int(data.data.workers), len(source), method.trainer.num_devices)
    return regions.provide(regions.RegionPlan(f"{data.data.name}-train", source, spec, over_segment, folder, workers))
