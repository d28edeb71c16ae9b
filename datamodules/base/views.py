"""Views of a training batch, made on its device from keyed parameters.

Each picture of the GLOBAL batch has its own draw, keyed by (seed, view, step) and its place in the batch; a rank takes
the draws of its slice, so one process and several see the same views. With `of_epoch` the draws of a whole epoch are
made at once, keyed by (seed, view, epoch), and a batch takes those of its pictures. torchvision draws the order of the
colour changes anew at each call, which in the released loaders is once a picture: so here too.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor

from common import chance, distributed
from common.errors import ConfigError
from common.spec import IGNORE, OUTSIDE, Photometric, ViewSpec
from datamodules.base import affine, covering
from datamodules.base.transforms import Replay, draw_geometry, identity, replay, take

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GRAY = (0.2989, 0.587, 0.114)
"""torchvision's weights of red, green and blue in grey."""


@dataclass(frozen=True)
class Epoch:
    """What draws of views with `of_epoch` belong to."""

    number: int
    items: int
    """Training items of an epoch, one of which every index of a batch is."""


def make_views(
    batch: dict[str, Any], specs: Mapping[str, ViewSpec], seed: int, step: int, epoch: Epoch | None = None
) -> dict[str, Any]:
    """Adds to the batch, for each view: `<name>` float32 [B,3,h,w]; `<name>.params`, a `transforms.Replay` from the
    frame of the view's source to the view; and `<name>.<map>` for each integer or bool map [B,H,W] of the source
    (`label`, `valid`, `regions`), carried along with nearest; outside labels are IGNORE and regions OUTSIDE. Where a
    view has an affine map, also `<name>.affine` float32 [B,2,3], see `affine.draw_affine`.

    A view may start from another one that stands before it (`source`). Without geometry the maps are the source's own.
    Raises ConfigError for a source or a name that cannot be.
    """
    rank, world = distributed.rank(), distributed.world_size()
    chosen = covering.geometries(batch, specs, seed, step)
    for name, spec in specs.items():
        _check(name, spec, batch)
        image = batch[spec.source]
        count, frame = len(image), tuple(image.shape[-2:])
        if spec.of_epoch:
            drawn, number, rows = epoch.items, epoch.number, batch["index"].cpu()
        else:
            drawn, number, rows = count * world, step, slice(rank * count, (rank + 1) * count)
        with torch.no_grad():
            params = identity(count, frame, image.device)
            if name in chosen:
                params = chosen[name]
            elif spec.geometric is not None:
                params = take(_geometry(spec, drawn, frame, seed, name, number), rows, image.device)
            view = replay(image, params, "bilinear")
            if spec.photometric is not None:
                view = recolour(view, spec.photometric, _colour(spec, drawn, seed, name, number).take(rows))
            fills = {"regions": OUTSIDE}
            maps = _maps(batch, spec.source, frame)
            maps = {key: replay(value, params, "nearest", fill=fills.get(key)) for key, value in maps.items()}
            if spec.affine is not None:
                moved = _affine(spec, drawn, seed, name, number)[rows].to(image.device, non_blocking=True)
                view = affine.warped(view, moved)
                maps = {key: affine.warped_ids(value, moved, fills.get(key, IGNORE)) for key, value in maps.items()}
                batch[f"{name}.affine"] = moved
            batch |= {f"{name}.{key}": value for key, value in maps.items()}
        batch[name], batch[f"{name}.params"] = view, params
    return batch


@lru_cache(maxsize=8)
def _geometry(spec: ViewSpec, count: int, frame: tuple[int, int], seed: int, name: str, number: int) -> Replay:
    """The draws of a step or epoch; kept, because all batches of an epoch may ask for the same."""
    return draw_geometry(spec.geometric, count, frame, chance.numpy_generator(seed, f"view.{name}.geometry", number))


@lru_cache(maxsize=8)
def _colour(spec: ViewSpec, count: int, seed: int, name: str, number: int) -> "Colour":
    return draw_colour(spec.photometric, count, chance.numpy_generator(seed, f"view.{name}.colour", number))


@lru_cache(maxsize=8)
def _affine(spec: ViewSpec, count: int, seed: int, name: str, number: int) -> Tensor:
    return affine.draw_affine(spec.affine, count, chance.numpy_generator(seed, f"view.{name}.affine", number))


def _check(name: str, spec: ViewSpec, batch: Mapping[str, Any]) -> None:
    if spec.source not in batch:
        raise ConfigError(f"view '{name}': its source '{spec.source}' must be 'image' or a view that stands before it")
    if name in batch or "." in name:
        raise ConfigError(f"view '{name}': the name must be new in the batch and without a dot")
    colour = spec.photometric
    if colour is not None and not 0 <= colour.hue <= 0.5:
        raise ConfigError(f"view '{name}': hue={colour.hue:g} must be 0 to 0.5 (of a full turn)")
    if colour is not None and (colour.blur_kernel < 1 or colour.blur_kernel % 2 == 0):
        raise ConfigError(f"view '{name}': blur_kernel={colour.blur_kernel} must be an odd number of pixels")


def _maps(batch: Mapping[str, Any], source: str, frame: tuple[int, int]) -> dict[str, Tensor]:
    prefix = "" if source == "image" else f"{source}."
    found = {}
    for key, value in batch.items():
        short = key.removeprefix(prefix)
        if not key.startswith(prefix) or "." in short or not isinstance(value, Tensor) or value.dim() != 3:
            continue
        if not value.is_floating_point() and tuple(value.shape[-2:]) == frame:
            found[short] = value
    return found


@dataclass(frozen=True)
class Colour:
    """Drawn colour changes of B pictures (numpy, on the host: what happens to which picture needs no device read)."""

    jitter: np.ndarray
    """bool [B]"""
    order: np.ndarray
    """int [B,4]: which of brightness, contrast, saturation, hue comes first, second, …; -1: none of them."""
    factors: np.ndarray
    """float32 [B,4]: the three factors, and the shift of hue in turns."""
    gray: np.ndarray
    """bool [B]"""
    blur: np.ndarray
    """bool [B]"""
    sigma: np.ndarray
    """float32 [B], pixels."""
    solarize: np.ndarray
    """bool [B]"""

    def take(self, rows: slice | Tensor) -> "Colour":
        rows = rows.numpy() if isinstance(rows, Tensor) else rows  # a tensor of one row would be taken for a number
        return Colour(*(getattr(self, f.name)[rows] for f in fields(self)))


def draw_colour(spec: Photometric, count: int, draw: np.random.Generator) -> Colour:
    """Draws for `count` pictures, in torchvision's ranges: factors uniform in [max(0, 1-s), 1+s], hue in [-s, s]."""
    strengths = np.array([spec.brightness, spec.contrast, spec.saturation])
    low, high = np.append(np.maximum(0, 1 - strengths), -spec.hue), np.append(1 + strengths, spec.hue)
    drawn = Colour(
        jitter=draw.random(count) < spec.jitter_p,
        order=draw.permuted(np.tile(np.arange(4), (count, 1)), axis=1),
        factors=draw.uniform(low, high, size=(count, 4)).astype(np.float32),
        gray=draw.random(count) < spec.gray_p,
        blur=draw.random(count) < spec.blur_p,
        sigma=draw.uniform(*spec.blur_sigma, size=count).astype(np.float32),
        solarize=draw.random(count) < spec.solarize_p,
    )
    if spec.separate:
        order = np.where(draw.random((count, 4)) < spec.jitter_p, np.arange(4), -1)
        drawn = replace(drawn, jitter=np.ones(count, dtype=bool), order=order)
    if spec.either:
        first = draw.random(count) < 0.5
        drawn = replace(drawn, jitter=drawn.jitter & first, gray=drawn.gray & ~first)
    return drawn


def recolour(image: Tensor, spec: Photometric, drawn: Colour) -> Tensor:
    """ColorJitter, grey, Gaussian blur, solarisation on pictures float32 [B,3,H,W] in 0..1; torchvision's formulas.

    Channels beyond the three colours (infrared) are blurred with them and otherwise left as they are.

    `spec.faithful`: on ImageNet-normalised values, as HP released it; each jitter step clamps them to 0..1, which loses
    everything below the mean and above one deviation. The result is un-normalised again, so that a backbone that
    normalises with the same constants sees what the released one saw; it may then leave 0..1.
    """
    mean = image.new_tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = image.new_tensor(IMAGENET_STD).view(3, 1, 1)
    whole = image.clone()
    out = whole[:, :3]
    if spec.faithful:
        out.sub_(mean).div_(std)
    for place in range(4):
        for number, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            chosen = drawn.jitter & (drawn.order[:, place] == number)
            _apply(out, chosen, change, drawn.factors[:, number])
    _apply(out, drawn.gray, lambda part, _: _gray(part).expand_as(part))
    kernel = (spec.blur_kernel, spec.blur_kernel)
    sigma = torch.from_numpy(drawn.sigma[drawn.blur]).view(-1, 1).expand(-1, 2)  # on the host, where kornia checks it
    _apply(whole, drawn.blur, lambda part, _: gaussian_blur2d(part, kernel, sigma))
    _apply(out, drawn.solarize, lambda part, _: torch.where(part >= 0.5, 1 - part, part))
    if spec.faithful:
        out.mul_(std).add_(mean)
    return whole


def _apply(
    images: Tensor, chosen: np.ndarray, change: Callable[[Tensor, Tensor], Tensor], values: np.ndarray | None = None
) -> None:
    """Replaces the chosen pictures, in place, by what `change` makes of them and of their `values` [n,1,1,1]."""
    if chosen.any():
        rows = torch.from_numpy(np.flatnonzero(chosen)).to(images.device, non_blocking=True)
        own = torch.from_numpy((chosen if values is None else values)[chosen]).to(images.device, non_blocking=True)
        images[rows] = change(images[rows], own.view(-1, 1, 1, 1))


def _blend(image: Tensor, other: Tensor | float, factor: Tensor) -> Tensor:
    return (factor * image + (1 - factor) * other).clamp_(0, 1)


def _gray(image: Tensor) -> Tensor:
    red, green, blue = image.unbind(1)
    return (GRAY[0] * red + GRAY[1] * green + GRAY[2] * blue).unsqueeze(1)


def _brightness(image: Tensor, factor: Tensor) -> Tensor:
    return (factor * image).clamp_(0, 1)


def _contrast(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, _gray(image).mean(dim=(1, 2, 3), keepdim=True), factor)


def _saturation(image: Tensor, factor: Tensor) -> Tensor:
    return _blend(image, _gray(image), factor)


def _hue(image: Tensor, shift: Tensor) -> Tensor:
    """Turns the hue by `shift` (turns). HSV without the detour over the saturation: each channel is max - delta * w.

    Also defined for values outside 0..1 (`faithful`): there the largest channel stays and the others are clamped.
    """
    red, green, blue = image.unbind(1)
    largest, smallest = image.amax(1), image.amin(1)
    delta = largest - smallest
    divisor = torch.where(delta == 0, torch.ones_like(delta), delta)
    sector = torch.where(
        largest == red,
        (green - blue) / divisor,
        torch.where(largest == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    sector = (sector + 6 * shift.view(-1, 1, 1)).remainder_(6)
    channels = []
    for offset in (5, 3, 1):
        place = (sector + offset).remainder_(6)
        weight = torch.minimum(place, 4 - place).clamp_(0, 1)
        channels.append(torch.where(weight == 0, largest, (largest - delta * weight).clamp_(0, 1)))
    return torch.stack(channels, dim=1)
