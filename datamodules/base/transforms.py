"""Geometry: resizing and cropping in the data set (Pillow, at the picture's own size), replayable crops on the device.

Pictures are resized as released or bilinear with antialias (see `resizing`), labels always by their nearest pixel, so
no label value is ever invented.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.errors import ConfigError
from common.precision import exact, real
from common.spec import IGNORE, Geometric
from datamodules.base.resizing import INTERPOLATIONS, resize_ids, resize_picture

CROPS = ("center", "random", "five", "none", "keep")
NATIVE = "native"
"""A further crop, for offline stages and not for a configuration: the whole picture at the size of its file."""
FIXED_CROPS = ("center", "five", "none")
"""Those that cut every picture to one size, always in the same way."""


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes a crop of `size`. See `resize_and_crop` for the meaning of each crop."""

    size: int | tuple[int, int]
    crop: str = "center"
    interpolation: str = "bilinear"
    flip_p: float = 0.0
    five_crop_ratio: float = 0.5

    @classmethod
    def from_config(cls, data: Any, split: str) -> "Geometry":
        """From cfg.data; `split` is "train" or "eval". Raises ConfigError naming the key that does not fit."""
        crops = CROPS if split == "train" else ("center", "none", "keep")
        size, crop = data[f"{split}_size"], str(data[f"{split}_crop"])
        sides = [size] if isinstance(size, int) else list(size) if size is not None else []
        pair = isinstance(size, int) or len(sides) == 2
        if not pair or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ConfigError(f"data.{split}_size={size}: must be a whole number of pixels (shorter side), or [H,W]")
        if crop not in crops:
            raise ConfigError(f"data.{split}_crop={crop}: must be one of {', '.join(crops)}")
        if crop == "keep" and len(sides) == 2:
            raise ConfigError(
                f"data.{split}_size={list(sides)}: with data.{split}_crop=keep it must be one number, the shorter side"
            )
        if data.interpolation not in INTERPOLATIONS:
            raise ConfigError(f"data.interpolation={data.interpolation}: must be one of {', '.join(INTERPOLATIONS)}")
        for key, low_open in (("flip_p", False), ("five_crop_ratio", True)):
            value = float(data[key])
            if not (0 < value <= 1 if low_open else 0 <= value <= 1):
                raise ConfigError(f"data.{key}={value:g}: must be {'above 0' if low_open else '0'} to 1")
        return cls(
            size=sides[0] if len(sides) == 1 else (sides[0], sides[1]),
            crop=crop,
            interpolation=str(data.interpolation),
            flip_p=float(data.flip_p) if split == "train" else 0.0,
            five_crop_ratio=float(data.five_crop_ratio),
        )

    @classmethod
    def whole(cls, cfg: Any) -> "Geometry":
        """The whole picture, its shorter side `predict.size` (null: data.eval_size): what `predict` shows a network."""
        size = cfg.predict.size or cfg.data.eval_size
        return cls(size if isinstance(size, int) else min(size), "keep", cfg.data.interpolation)

    @property
    def crops(self) -> int:
        """Items that each picture gives."""
        return 5 if self.crop == "five" else 1

    def resize(
        self, image: np.ndarray, label: np.ndarray | None, crop: int = 0
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The part that is the same each time: uint8 [H,W,3] and label [H,W] resized, before random crop and flip.

        crop: which of the five crops, with "five"; they are cut out of the whole picture first, then resized. A central
        window is cut out here as well, so that nothing is kept that is never seen.
        """
        if self.crop == "five":
            top, left, height, width = five_crop_boxes(*image.shape[:2], self.five_crop_ratio)[crop]
            image = image[top : top + height, left : left + width]
            label = None if label is None else label[top : top + height, left : left + width]
        image, label = resize_pair(image, label, self.size, self._window, self.interpolation)
        if self._window == "center":
            image, label = crop_pair(image, label, self.size, "center")
            image, label = np.ascontiguousarray(image), None if label is None else np.ascontiguousarray(label)
        return image, label

    def resize_map(self, ids: np.ndarray, crop: int = 0) -> np.ndarray:
        """A map of ids [H,W] of the whole picture, as `resize` does it to a label: int32, nearest."""
        if self.crop == "five":
            top, left, height, width = five_crop_boxes(*ids.shape, self.five_crop_ratio)[crop]
            ids = ids[top : top + height, left : left + width]
        size = resized_size(*ids.shape, self.size, self._window)
        ids = resize_ids(ids.astype(np.int32), size, self.interpolation)
        return np.ascontiguousarray(crop_pair(ids, None, self.size, "center")[0]) if self._window == "center" else ids

    def kept_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of what `resize` gives for a picture of this size."""
        if self._window == "center":
            return (self.size, self.size) if isinstance(self.size, int) else self.size
        return resized_size(height, width, self.size, self._window)

    def finish(
        self, image: np.ndarray, label: np.ndarray | None, draw: np.random.Generator, flip: bool = False
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The crop window of a resized picture, and its mirror image with probability flip_p, drawn from `draw`.

        `label`: one map [H,W], or several, [H,W,n].
        """
        image, label = crop_pair(image, label, self.size, self._window, draw)
        if flip and draw.random() < self.flip_p:
            image, label = image[:, ::-1], None if label is None else label[:, ::-1]
        return image, label

    @property
    def _window(self) -> str:
        return "center" if self.crop == "five" else self.crop


def five_crop_boxes(height: int, width: int, ratio: float) -> np.ndarray:
    """int64 [5,4], rows top left, top right, bottom left, bottom right, centre; columns top, left, height, width.

    Sizes are int(side * ratio), the centre's offset is (side - crop) / 2 rounded half to even: torchvision's five_crop
    as STEGO (crop_datasets.py) and HP used it.
    """
    h, w = max(1, int(height * ratio)), max(1, int(width * ratio))
    bottom, right = height - h, width - w
    corners = [(0, 0), (0, right), (bottom, 0), (bottom, right), (round(bottom / 2), round(right / 2))]
    return np.array([(top, left, h, w) for top, left in corners], dtype=np.int64)


def resize_and_crop(
    image: np.ndarray,
    label: np.ndarray | None,
    size: int | tuple[int, int],
    crop: str,
    interpolation: str = "bilinear",
    draw: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Picture uint8 [H,W,3] and label [H,W] at the size the networks see; one geometry for both.

    size: the shorter side in pixels, or (H, W). crop "center" and "random": resize until `size` is covered, the aspect
    kept (int: shorter side = size and a square crop), then crop in the middle or at a position drawn uniformly from
    `draw`; "none": resize to exactly `size`, the aspect not kept; "keep": only the shorter side is resized.
    interpolation: one of `resizing.INTERPOLATIONS`; the label takes the nearest pixels by the same library.
    """
    return crop_pair(*resize_pair(image, label, size, crop, interpolation), size, crop, draw)


def resize_pair(
    image: np.ndarray, label: np.ndarray | None, size: int | tuple[int, int], crop: str, interpolation: str
) -> tuple[np.ndarray, np.ndarray | None]:
    """The first half of `resize_and_crop`."""
    resized = resized_size(*image.shape[:2], size, crop)
    image = resize_picture(image, resized, interpolation)
    return image, None if label is None else resize_ids(label, resized, interpolation)


def resized_size(height: int, width: int, size: int | tuple[int, int], crop: str) -> tuple[int, int]:
    """(height, width) that a picture is resized to before it is cropped."""
    if crop == NATIVE:
        return height, width
    if crop == "none":
        return (size, size) if isinstance(size, int) else (size[0], size[1])
    if isinstance(size, int):
        return (size, int(size * width / height)) if height <= width else (int(size * height / width), size)
    return _cover(height, width, tuple(size))


def both_sides(size: int | Sequence[int]) -> tuple[int, int]:
    """H and W of a size: one number for both, or [H,W]."""
    return (size, size) if isinstance(size, int) else tuple(size)


def crop_pair(
    image: np.ndarray,
    label: np.ndarray | None,
    size: int | tuple[int, int],
    crop: str,
    draw: np.random.Generator | None = None,
) -> tuple[np.ndarray, np.ndarray | None]:
    """The second half of `resize_and_crop`."""
    if crop in ("none", "keep", NATIVE):
        return image, label
    target = both_sides(size)
    free = image.shape[0] - target[0], image.shape[1] - target[1]
    if crop == "center":
        top, left = round(free[0] / 2), round(free[1] / 2)
    elif crop == "random":
        if draw is None:
            raise ValueError("a random crop needs a generator")
        top, left = int(draw.integers(free[0] + 1)), int(draw.integers(free[1] + 1))
    else:
        raise ValueError(f"crop={crop!r}: center, random, none or keep")
    window = slice(top, top + target[0]), slice(left, left + target[1])
    return image[window], None if label is None else label[window]


def loader_transform(image: np.ndarray, label: np.ndarray, res: int, crop: str) -> tuple[Tensor, Tensor]:
    """The released loader (STEGO `get_transform`): nearest for both, crop "center" or "none" (res x res directly).

    uint8 [H,W,3], uint8 [H,W] -> float32 [3,res,res] in 0..1 (not normalised), int64 [res,res].
    """
    resized, ids = resize_and_crop(image, label, int(res), str(crop), "nearest")
    picture = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float().div_(255)
    return picture, torch.from_numpy(np.array(ids)).long()


def _cover(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    if target[0] * width >= target[1] * height:
        return target[0], max(target[1], int(target[0] * width / height))
    return max(target[0], int(target[1] * height / width)), target[1]


# ---- on the device: crops that can be replayed ----


@dataclass(frozen=True)
class Replay:
    """A resized crop and flip of each picture of a batch, replayable on any tensor over the same frame.

    boxes float32 [B,4] top, left, height, width in pixels of the source frame; flip bool [B]; source and size are
    (height, width) in pixels of the source frame and of the result.
    """

    boxes: Tensor
    flip: Tensor
    source: tuple[int, int]
    size: tuple[int, int]
    identity: bool = False
    shares: Tensor | None = None
    """Where set (`Geometric.whole_cells`), float64 [B,3]: share of the sides, draws of the top and of the left, from
    which every grid makes a box of its own whole cells."""


def identity(batch: int, size: tuple[int, int], device: torch.device) -> Replay:
    """The geometry that changes nothing."""
    boxes = torch.tensor([0.0, 0.0, *size], device=device).expand(batch, 4)
    return Replay(boxes, torch.zeros(batch, dtype=torch.bool, device=device), size, size, identity=True)


def draw_geometry(spec: Geometric, count: int, source: tuple[int, int], draw: np.random.Generator) -> Replay:
    """Resized crops and flips for `count` pictures of `source` pixels, on the CPU.

    As torchvision's RandomResizedCrop: area uniform in scale, aspect log-uniform in ratio, the first of ten boxes that
    fits, else the largest central box with an allowed aspect. Sides and offsets are whole pixels.
    """
    height, width = source
    if spec.zoom is not None:
        return _zoomed(spec, count, source, draw)
    if spec.sides is not None:
        return _sided(spec, count, source, draw)
    area = draw.uniform(*spec.scale, size=(count, 10)) * height * width
    aspect = np.exp(draw.uniform(np.log(spec.ratio[0]), np.log(spec.ratio[1]), size=(count, 10)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    place = draw.random((count, 2))
    flip = draw.random(count) < spec.flip_p
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = fits.argmax(1)
    rows = np.arange(count)
    w, h, found = w[rows, first], h[rows, first], fits.any(1)
    whole = width / height
    central_h = height if whole >= spec.ratio[0] else round(width / spec.ratio[0])
    central_w = width if whole <= spec.ratio[1] else round(height * spec.ratio[1])
    h, w = np.where(found, h, central_h), np.where(found, w, central_w)
    top = np.where(found, np.floor(place[:, 0] * (height - h + 1)), np.rint((height - h) / 2))
    left = np.where(found, np.floor(place[:, 1] * (width - w + 1)), np.rint((width - w) / 2))
    boxes = torch.from_numpy(np.stack([top, left, h, w], axis=1)).float()
    return Replay(boxes, torch.from_numpy(flip), source, _result(spec, source))


def _result(spec: Geometric, source: tuple[int, int]) -> tuple[int, int]:
    """(H,W) of a view."""
    if spec.size is None:
        return source
    return (spec.size, spec.size) if isinstance(spec.size, int) else spec.size


def _zoomed(spec: Geometric, count: int, source: tuple[int, int], draw: np.random.Generator) -> Replay:
    """Windows of `spec.size` px (None: of the source's size) of pictures scaled by `spec.zoom`; offsets are uniform."""
    size = _result(spec, source)
    factor, place = draw.uniform(*spec.zoom, size=count), draw.random((count, 2))
    flip = draw.random(count) < spec.flip_p
    sides = [side / factor for side in size]  # of the window, in pixels of the source
    offsets = [place[:, i] * np.maximum(0.0, source[i] - sides[i]) for i in range(2)]
    boxes = torch.from_numpy(np.stack([*offsets, *sides], axis=1)).float()
    return Replay(boxes, torch.from_numpy(flip), source, size)


def _sided(spec: Geometric, count: int, source: tuple[int, int], draw: np.random.Generator) -> Replay:
    """Crops of the source's own aspect whose sides are a uniform share of its sides, in whole pixels (rounded down)."""
    low, high = spec.sides
    share = draw.uniform(low, high, size=count)
    if spec.side_step is not None:
        steps = int((high - low) / spec.side_step + 1e-6)
        share = low + spec.side_step * draw.integers(steps + 1, size=count)
    place, flip = draw.random((count, 2)), draw.random(count) < spec.flip_p
    if spec.whole_cells:
        shares = torch.from_numpy(np.column_stack([share, place]))
        boxes = cell_boxes(shares, source).float()
        return Replay(boxes, torch.from_numpy(flip), source, _result(spec, source), shares=shares)
    sides = [np.maximum(1, np.floor(side * share + 1e-6)) for side in source]
    offsets = [np.floor(place[:, i] * (source[i] - sides[i] + 1)) for i in range(2)]
    boxes = torch.from_numpy(np.stack([*offsets, *sides], axis=1)).float()
    return Replay(boxes, torch.from_numpy(flip), source, _result(spec, source))


def cell_boxes(shares: Tensor, grid: tuple[int, int]) -> Tensor:
    """Boxes of whole cells of a grid (h, w), float64 [B,4] as in `Replay`: sides rounded down."""
    cells = torch.tensor(grid, dtype=torch.float64, device=shares.device)
    sides = (shares[:, :1] * cells).floor().clamp_(min=1)
    return torch.cat([((cells - sides) * shares[:, 1:]).round(), sides], dim=1)


def take(params: Replay, rows: slice | Tensor, device: torch.device) -> Replay:
    """The geometry of some pictures of the batch, on a device."""
    of = {name: getattr(params, name) for name in ("boxes", "flip", "shares")}
    mine = {name: None if part is None else part[rows].to(device, non_blocking=True) for name, part in of.items()}
    return replace(params, **mine)


def replay(
    tensor: Tensor,
    params: Replay,
    mode: str = "bilinear",
    fill: float | int | bool | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """The same crop and flip on another tensor over the same frame: a feature map, a label map, a coordinate grid.

    tensor [B,C,h,w] or [B,h,w]; its h, w may differ from the frame's pixels (a feature map), the box is scaled with
    them, and so is the result unless `size` says otherwise. mode "nearest" copies values (any type, ids stay exact),
    "bilinear" interpolates floats (align_corners False, no antialias; gradient flows). Positions outside the frame get
    `fill`; default for nearest: 255 (IGNORE) in integer maps, False in masks, 0 in floats; for bilinear: the nearest
    border value. With `shares` a bilinear box is of the tensor's own whole cells, and nothing beyond it is looked at.
    """
    if params.identity and (size is None or size == tuple(tensor.shape[-2:])):
        return tensor
    height, width = tensor.shape[-2:]
    scale = height / params.source[0], width / params.source[1]
    if size is None:
        size = tuple(max(1, round(n * s)) for n, s in zip(params.size, scale, strict=True))
    if params.shares is not None and mode == "bilinear":
        return _own_cells(tensor, params, size)
    y, x = _positions(params, scale, size)
    outside = ((y < 0) | (y >= height))[:, :, None] | ((x < 0) | (x >= width))[:, None, :]
    flat = tensor if tensor.dim() == 4 else tensor.unsqueeze(1)
    if mode == "nearest":
        if fill is None:
            fill = False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else IGNORE
        rows = y.floor().long().clamp(0, height - 1)[:, None, :, None]
        columns = x.floor().long().clamp(0, width - 1)[:, None, None, :]
        pictures = torch.arange(len(flat), device=tensor.device)[:, None, None, None]
        channels = torch.arange(flat.shape[1], device=tensor.device)[None, :, None, None]
        out = flat[pictures, channels, rows, columns]
    elif mode == "bilinear":
        if not tensor.is_floating_point():
            raise ValueError(f"mode='bilinear' interpolates floats; a tensor of {tensor.dtype} needs mode='nearest'")
        grid_y, grid_x = (2 * y / height - 1)[:, :, None], (2 * x / width - 1)[:, None, :]
        grid = torch.stack(torch.broadcast_tensors(grid_x, grid_y), dim=-1)
        out = functional.grid_sample(flat.float(), grid, "bilinear", padding_mode="border", align_corners=False)
        out = out.to(tensor.dtype)
    else:
        raise ValueError(f"mode={mode!r}: 'nearest' or 'bilinear'")
    if fill is not None:
        out = out.masked_fill(outside[:, None], fill)
    return out if tensor.dim() == 4 else out.squeeze(1)


def _own_cells(tensor: Tensor, params: Replay, size: tuple[int, int]) -> Tensor:
    """Crops of whole cells of [B,C,h,w], resized to `size` and mirrored, as two products with interpolation weights:
    their gradient is the same in every run, which that of torch's own interpolation is not on GPUs."""
    boxes = cell_boxes(params.shares, tuple(tensor.shape[-2:]))
    down, right = (_weights(boxes[:, i], boxes[:, i + 2], tensor.shape[2 + i], size[i]) for i in range(2))
    right = torch.where(params.flip[:, None, None], right.flip(1), right)
    values = real(tensor)
    with exact(tensor.device):
        out = down[:, None].to(values.dtype) @ values @ right[:, None].mT.to(values.dtype)
    return out.to(tensor.dtype)


def _weights(first: Tensor, side: Tensor, cells: int, size: int) -> Tensor:
    """Of bilinear interpolation (align_corners False) of `side` cells from `first` on to `size` ones: float64
    [B,size,cells]; beyond the ends the border value counts."""
    steps = torch.arange(size, device=side.device, dtype=torch.float64) + 0.5
    place = (steps * side[:, None] / size - 0.5).clamp_(min=0)
    low = place.floor()
    share, ends = place - low, side[:, None] - 1
    weights = place.new_zeros(len(side), size, cells)
    for at, part in ((low, 1 - share), (low + 1, share)):
        where = (first[:, None] + torch.minimum(at, ends)).long()
        weights.scatter_add_(2, where[..., None], part[..., None])
    return weights


def meeting(own: Replay, other: Replay, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the cells of one view lie in another view of the same pictures.

    own, other: geometries from one source frame. grid: (h, w) cells of `own`. Returns the centres of its cells in
    `other` as `grid_sample` wants them, float32 [B,h,w,2] (x, y in -1..1, align_corners False), and bool [B,h,w]:
    whether the centre lies inside `other`.
    """
    y, x = _positions(own, (1.0, 1.0), grid)
    top, left, height, width = (side[:, None] for side in other.boxes.unbind(1))
    y, x = 2 * (y - top) / height - 1, 2 * (x - left) / width - 1
    x = torch.where(other.flip[:, None], -x, x)
    places = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
    return places, (places.abs() <= 1).all(-1)


def _positions(params: Replay, scale: tuple[float, float], size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Source coordinates (pixel edges at whole numbers) of the result's rows [B,h] and columns [B,w]."""
    top, left, height, width = params.boxes.unbind(1)
    down, right = (2 * torch.arange(side, device=top.device) + 1 for side in size)  # centres, in half pixels: exact
    right = torch.where(params.flip[:, None], 2 * size[1] - right, right)
    y = (top[:, None] + down * height[:, None] / (2 * size[0])) * scale[0]
    x = (left[:, None] + right * width[:, None] / (2 * size[1])) * scale[1]
    return y, x
