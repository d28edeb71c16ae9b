"""The table of near training pictures, for methods that want a neighbour beside every picture (`neighbours`)."""

import logging
from typing import Any

import torch
from torch import Tensor

from common import chance
from common.errors import ConfigError
from common.files import cache_folder
from common.spec import NeighbourSpec
from lightning_modules.base.asked import Asked
from models.heads import drop_channels
from retrieval import neighbours

log = logging.getLogger(__name__)


@torch.no_grad()
def near_pictures(method: Asked, data: Any, spec: NeighbourSpec) -> tuple[str, Tensor]:
    """Fingerprint and table int64 [items,stored] of the training items nearest to each; a collective.

    data: the DataModule.

    Pictures are compared by their frozen features at training size, always the same crop, without mirroring. The table
    is read from `cache.dir` where it was made before. A resumed run whose table is another one says so.

    Raises:
        ConfigError: the backbone is trained, so that no table would stay true.
    """
    if not method.backbone.frozen:
        raise ConfigError(
            f"backbone.frozen=false: method={method.cfg.method.name} looks for near pictures once, by frozen features; "
            "set backbone.frozen=true"
        )
    geometry = data.fixed_geometry
    name = neighbours.fingerprint(
        backbone=method.backbone.features_key,
        pictures=data.fingerprint("train", geometry),
        stored=spec.stored,
        dropout=[spec.dropout, method.cfg.seed] if spec.dropout else None,
        same_picture=spec.same_picture,
    )
    if method.neighbour_table not in (None, name):
        log.warning(
            "The table of neighbours was %s when this run was stopped and is %s now (other pictures, backbone weights "
            "or settings): the run goes on with other neighbours than it would have seen",
            method.neighbour_table,
            name,
        )

    def make() -> Tensor:
        rows, items = [], []
        for batch in method.unlabelled_loader("train", geometry=geometry, purpose="neighbours"):
            maps = method.frozen_features("train", batch).concat()  # kept ones have this geometry: none has chance
            mask = dropout_mask(method.cfg.seed, batch["index"], maps.shape[1], spec.dropout)
            rows.append(neighbours.pooled(drop_channels(maps, None if mask is None else mask.to(maps.device))))
            items.append(batch["index"])
        empty = torch.empty(0, method.backbone.dim, device=method.device)
        vectors = torch.cat(rows) if rows else empty
        found = torch.cat(items) if items else torch.empty(0, dtype=torch.int64)
        per_picture = 1 if spec.same_picture else geometry.crops
        return neighbours.table(vectors, found, data.train_items, spec.stored, per_picture)

    return name, neighbours.cached(cache_folder(method.cfg) / "neighbours", name, make)


def dropout_mask(seed: int, items: Tensor, channels: int, p: float) -> Tensor | None:
    """Channel dropout of each picture, drawn by (seed, item): [B,C], 0 or 1 / (1 - p); None without dropout."""
    if p == 0:
        return None
    uniform = [torch.rand(channels, generator=chance.generator(seed, "neighbours.dropout", item)) for item in items]
    return (torch.stack(uniform) >= p).float() / (1 - p)
