"""Crops that have to show something: views of a picture that are drawn anew together until all of them do.

Each picture of the GLOBAL batch has its own draws, keyed by (seed, view, step, attempt), and whether it needs another
attempt depends on its own map alone; so one process and several see the same crops. Source: MaskContrast (ICCV 2021),
which takes another picture where three attempts fail; here the views show the whole picture.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Cover, ViewSpec
from datamodules.base.transforms import Replay, draw_geometry, replay, take


def geometries(batch: Mapping[str, Any], specs: Mapping[str, ViewSpec], seed: int, step: int) -> dict[str, Replay]:
    """The geometry of every view that names a cover, of this rank's pictures and on their device.

    Raises ConfigError where the batch has no map of that name, and for a view that is no crop of `image` of the step.
    """
    groups: dict[Cover, list[str]] = {}
    for name, spec in specs.items():
        if spec.cover is None:
            continue
        if spec.geometric is None or spec.of_epoch or spec.source != "image":
            raise ConfigError(f"view '{name}': a cover is of crops of `image` that are drawn at every step")
        groups.setdefault(spec.cover, []).append(name)
    found: dict[str, Replay] = {}
    for cover, names in groups.items():
        if cover.map not in batch:
            raise ConfigError(
                f"view '{names[0]}': its cover wants the map '{cover.map}', which the batch does not have"
            )
        found |= _together(batch[cover.map] == cover.value, {name: specs[name] for name in names}, cover, seed, step)
    return found


@torch.no_grad()
def _together(mask: Tensor, specs: Mapping[str, ViewSpec], cover: Cover, seed: int, step: int) -> dict[str, Replay]:
    """masks bool [B,H,W] of the pictures."""
    count, frame = len(mask), tuple(mask.shape[-2:])
    open_rows = torch.ones(count, dtype=torch.bool, device=mask.device)
    found: dict[str, Replay] = {}
    for attempt in range(cover.tries):
        drawn = {name: _drawn(spec, count, frame, (seed, name, step, attempt)) for name, spec in specs.items()}
        drawn = {name: take(params, slice(None), mask.device) for name, params in drawn.items()}
        found = {name: _where(open_rows, params, found.get(name, params)) for name, params in drawn.items()}
        open_rows = ~torch.stack([shows(mask, params, cover) for params in found.values()]).all(0)
        if not bool(open_rows.any()):
            return found
    whole = torch.tensor([0.0, 0.0, *frame], device=mask.device)
    return {
        name: replace(params, boxes=torch.where(open_rows[:, None], whole, params.boxes))
        for name, params in found.items()
    }


def _drawn(spec: ViewSpec, count: int, frame: tuple[int, int], key: tuple[int, str, int, int]) -> Replay:
    """This rank's part of the draws of an attempt; those of the first are what the view without a cover would have."""
    seed, name, step, attempt = key
    draw = chance.numpy_generator(seed, f"view.{name}.geometry", step, *([attempt] if attempt else []))
    whole = draw_geometry(spec.geometric, count * distributed.world_size(), frame, draw)
    first = distributed.rank() * count
    return take(whole, slice(first, first + count), torch.device("cpu"))


def _where(rows: Tensor, one: Replay, other: Replay) -> Replay:
    """`one` at the rows bool [B], elsewhere `other`."""
    boxes = torch.where(rows[:, None], one.boxes, other.boxes)
    return replace(one, boxes=boxes, flip=torch.where(rows, one.flip, other.flip))


def shows(mask: Tensor, params: Replay, cover: Cover) -> Tensor:
    """Whether the crop of each mask bool [B,H,W] covers the wanted share of it: bool [B]."""
    share = replay(mask, params, "nearest").float().mean((1, 2))
    low, high = cover.share
    return (share >= low) & (share <= high)
