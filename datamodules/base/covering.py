"""Crops that have to show something: views of a picture that are drawn anew until they do.

With a `Cover` views that go together have to show a part of one map of the picture; with a `Meeting` a view has to show
a part of what other views show. Each picture of the GLOBAL batch has its own draws, keyed by (seed, view, step,
attempt), and whether it needs another attempt depends on it alone; so one process and several see the same crops.
Sources: MaskContrast (ICCV 2021), which takes another picture where three attempts fail (here the views show the whole
picture); Leopart (CVPR 2022), which draws until crops meet.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError
from common.spec import Cover, Meeting, ViewSpec
from datamodules.base.transforms import Replay, draw_geometry, replay, take


def geometries(batch: Mapping[str, Any], specs: Mapping[str, ViewSpec], seed: int, step: int) -> dict[str, Replay]:
    """The geometry of every view that names a cover or a meeting and of those that it has to meet, of this rank's
    pictures and on their device.

    Raises ConfigError where the batch has no map of that name, for a view that is no crop of `image` of the step, and
    for one that has to meet a view which does not stand before it.
    """
    return _covering(batch, specs, seed, step) | _meeting(batch, specs, seed, step)


def _covering(batch: Mapping[str, Any], specs: Mapping[str, ViewSpec], seed: int, step: int) -> dict[str, Replay]:
    groups: dict[Cover, list[str]] = {}
    for name, spec in specs.items():
        if spec.cover is None:
            continue
        _expect_crop(name, spec, "a cover")
        groups.setdefault(spec.cover, []).append(name)
    found: dict[str, Replay] = {}
    for cover, names in groups.items():
        if cover.map not in batch:
            raise ConfigError(
                f"view '{names[0]}': its cover wants the map '{cover.map}', which the batch does not have"
            )
        found |= _together(batch[cover.map] == cover.value, {name: specs[name] for name in names}, cover, seed, step)
    return found


def _expect_crop(name: str, spec: ViewSpec, what: str) -> None:
    if spec.geometric is None or spec.of_epoch or spec.source != "image":
        raise ConfigError(f"view '{name}': {what} is of crops of `image` that are drawn at every step")


def _meeting(batch: Mapping[str, Any], specs: Mapping[str, ViewSpec], seed: int, step: int) -> dict[str, Replay]:
    """Everything is drawn and compared on the host, where the draws are made."""
    wanted = {other for spec in specs.values() if spec.meets is not None for other in spec.meets.views}
    image = batch["image"]
    count, frame = len(image), tuple(image.shape[-2:])
    found: dict[str, Replay] = {}
    for name, spec in specs.items():
        if spec.meets is None and name not in wanted:
            continue
        _expect_crop(name, spec, "a meeting")
        if spec.cover is not None:
            raise ConfigError(
                f"view '{name}': a view that others have to meet, or that has to meet others, has no cover"
            )
        found[name] = _drawn(spec, count, frame, (seed, name, step, 0))
        if spec.meets is None:
            continue
        if missing := [other for other in spec.meets.views if other not in found or other == name]:
            raise ConfigError(
                f"view '{name}': '{missing[0]}', which it has to meet, must be a view that stands before it"
            )
        for attempt in range(1, spec.meets.tries + 1):
            apart = ~meets(found[name], [found[other] for other in spec.meets.views], spec.meets)
            if not bool(apart.any()):
                break
            if attempt < spec.meets.tries:
                found[name] = _where(apart, _drawn(spec, count, frame, (seed, name, step, attempt)), found[name])
            elif spec.meets.whole:
                boxes = torch.where(apart[:, None], torch.tensor([0.0, 0.0, *frame]), found[name].boxes)
                found[name] = replace(found[name], boxes=boxes)
    return {name: take(params, slice(None), image.device) for name, params in found.items()}


def meets(own: Replay, others: Sequence[Replay], rule: Meeting) -> Tensor:
    """Whether the crop of each picture has enough in common with each of the others: bool [B]."""
    top, left, height, width = own.boxes.double().unbind(1)
    area = height * width if rule.of_own else float(own.source[0] * own.source[1])
    enough = torch.ones(len(own.boxes), dtype=torch.bool, device=own.boxes.device)
    for other in others:
        y, x, rows, columns = other.boxes.double().unbind(1)
        down = torch.minimum(top + height, y + rows) - torch.maximum(top, y)
        right = torch.minimum(left + width, x + columns) - torch.maximum(left, x)
        enough &= down.clamp(min=0) * right.clamp(min=0) > rule.share * area
    return enough


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
