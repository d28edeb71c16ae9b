"""Small stages for tests: a few steps on the scenes, run for real."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import config
from datamodules.base.transforms import Geometry
from engine import setup
from engine.stages.stage import Stage
from pseudo_labels.cache import Record, Records
from pseudo_labels.steps import MapStep, ReduceStep, Results, Step, new_record
from retrieval import kmeans
from tests.conftest import small_words


class Dark(MapStep):
    """Segments: 1 where a picture is darker than its mean, 2 where it is much darker; no record of bright pictures."""

    name, counted = "dark", "names"

    def __init__(self, limit: float = 0.25) -> None:
        super().__init__()
        self.limit = limit

    def settings(self) -> dict[str, Any]:
        return {"limit": self.limit}

    def geometry(self) -> Geometry:
        return Geometry(32, "none")

    def record_bytes(self) -> int:
        return 4096

    def records(self, batch: dict[str, Any]) -> list[Record]:
        assert not [key for key in batch if "label" in key]
        found = []
        for row, picture in enumerate(batch["image"].mean(1)):
            cells = torch.nn.functional.avg_pool2d(picture[None], 8)[0]
            segments = (cells < picture.mean()).short() + (cells < self.limit).short()
            names = segments.unique()
            names = names[names > 0]
            means = torch.tensor([[float(cells[segments == name].mean())] for name in names]).view(-1, 1)
            record = new_record(batch, row, batch["image"], (4, 4), segments=segments, names=names, features=means)
            record.drop = "no_object" if not len(names) else "too_bright" if picture.mean() > 0.62 else ""
            found.append(record)
        return found


class Classes(ReduceStep):
    """k-means of the regions."""

    name, needs = "classes", ("dark",)

    def settings(self) -> dict[str, Any]:
        return {"k": 3, "seed": 0}

    def table(self, results: Results, device: torch.device) -> dict[str, Tensor]:
        points = torch.from_numpy(results["dark"].rows("features")[0]).to(device)
        found = kmeans.fit(points, 3, spherical=False)
        return {"centroids": found.centroids, "assignment": kmeans.assign(points, found.centroids, spherical=False)}


def stage(folder: Path, steps: list[Step], *words: str, batch_size: int = 2, shard: int = 4) -> Stage:
    """A stage of these steps on the small scenes, kept below `folder`."""
    cfg = config.compose(small_words("kmeans_baseline", f"cache.dir={folder}", *words))
    cfg, data = setup.build_data(cfg)
    cfg = config.changed(cfg, {"method.stage": {"size": None, "batch_size": batch_size, "shard": shard}})
    return Stage(cfg, data, SimpleNamespace(steps=lambda _: steps))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, by name; no file is a leftover."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    assert not [name for name in found if ".part-" in name]
    return found


def first(records: Records) -> Record:
    return next(record for record in records.each() if record.keep)
