"""Dense CRF (Kraehenbuehl and Koltun, 2011) as STEGO and HP apply it: mean field on permutohedral lattices, in torch.

Both Gaussian kernels are filtered on a lattice (Adams et al., 2010), held as sparse matrices: pixels to vertices, one
blur along each lattice axis, vertices to pixels. So an iteration is a chain of sparse products, for all classes of
all read-outs at once, on any device. Equal to the compiled library of the releases to rounding; an exact evaluation of
the kernels would give other labels on 2 to 3 % of the pixels.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import ConfigError
from evaluation import readout

SMALLEST = 1e-5
"""Probabilities below it count as this in the unary term, as in the library."""
KEPT_SIZES = 8
"""Spatial lattices that are kept, one a picture size."""
BLOCK_PIXELS = {"cpu": 1, "cuda": 1 << 20}
"""Pixels of the pictures that share one lattice; a picture at least."""
LARGEST_KEY = 1 << 62


@dataclass(frozen=True)
class Constants:
    """Of the mean field. Distances in pixels, colours in 0..255. The defaults are those of STEGO and HP."""

    iterations: int = 10
    gauss_sxy: float = 1.0
    """Standard deviation of the smoothness kernel."""
    gauss_weight: float = 3.0
    bilateral_sxy: float = 67.0
    """Standard deviations of the appearance kernel, over places and over colours."""
    bilateral_srgb: float = 3.0
    bilateral_weight: float = 4.0

    def __str__(self) -> str:
        """How metrics.json names it."""
        return (
            f"dense, {self.iterations} iterations, smoothness {self.gauss_weight:g} ({self.gauss_sxy:g} px), "
            f"appearance {self.bilateral_weight:g} ({self.bilateral_sxy:g} px, {self.bilateral_srgb:g} of 255)"
        )

    def check(self, key: str) -> None:
        """Raises ConfigError, naming the key below `key`, for what no mean field can be run with."""
        for name in ("iterations", "gauss_sxy", "bilateral_sxy", "bilateral_srgb"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{key}.{name}={getattr(self, name)}: must be above 0")
        for name in ("gauss_weight", "bilateral_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{key}.{name}={getattr(self, name)}: must not be negative")


class Lattice:
    """A symmetrically normalised Gaussian filter over points f [B,N,d] of B pictures: values -> n G(n values).

    n = (G(1) + 1e-20)^-1/2. With `weight` w the result is w times that.
    """

    def __init__(self, points: Tensor, weight: float):
        splat, self.blurs, slicing = _matrices(points)
        ones = torch.ones(splat.shape[1], 1, dtype=points.dtype, device=points.device)
        self.splat, self.slice = splat, slicing
        norm = (self(ones) + 1e-20).rsqrt().flatten()
        self.splat = _scaled(splat, norm[splat.col_indices()])
        rows = norm.repeat_interleave(slicing.crow_indices().diff())
        self.slice = _scaled(slicing, rows * weight)

    def __call__(self, values: Tensor) -> Tensor:
        """values [B*N,K] -> [B*N,K]."""
        return self.slice @ self._on_vertices(values)

    def add_to(self, total: Tensor, values: Tensor) -> Tensor:
        """total + the filtered values."""
        return torch.addmm(total, self.slice, self._on_vertices(values))

    def _on_vertices(self, values: Tensor) -> Tensor:
        values = self.splat @ values
        for blur in self.blurs:
            values = blur @ values
        return values


class DenseCRF:
    """Mean field of pictures with K class probabilities; keeps the spatial lattices of the sizes it has seen."""

    def __init__(self, constants: Constants | None = None):
        self.constants = Constants() if constants is None else constants
        self._spatial: OrderedDict[tuple, Lattice] = OrderedDict()

    @staticmethod
    def at_once(images: Tensor) -> int:
        """How many of the pictures [B,3,H,W] share one lattice."""
        return max(1, BLOCK_PIXELS.get(images.device.type, 1) // images[0, 0].numel())

    @torch.no_grad()
    def __call__(self, images: Tensor, log_probs: Sequence[Tensor]) -> list[Tensor]:
        """Refined probabilities of each read-out.

        images uint8 [B,3,H,W] (R,G,B); log_probs: a [B,K_i,h,w] for each read-out, brought to H x W bilinearly where
        they are smaller, then to probabilities by softmax. Returns [B,K_i,H,W] float32 each, summing to 1 over K_i.
        """
        block = self.at_once(images)
        parts = [
            self._block(pictures, maps)
            for pictures, *maps in zip(images.split(block), *(maps.split(block) for maps in log_probs), strict=True)
        ]
        return [torch.cat(maps) for maps in zip(*parts, strict=True)]

    def predict(self, images: Tensor, valid: Tensor, log_probs: Sequence[Tensor]) -> list[Tensor]:
        """The best class of every pixel after the mean field, int64 [B,H,W] for each read-out.

        images float [B,3,H,W] in 0..1, on which valid [B,H,W] marks a rectangle from the top left corner, the rest is
        padding; log_probs [B,K_i,H,W] each. Padding takes no part; there the best class is that of `log_probs`.
        """
        if bool(valid.all()):
            return [beliefs.max(1).indices for beliefs in self(as_bytes(images), log_probs)]
        found = [maps.max(1).indices for maps in log_probs]
        for i, (image, inside) in enumerate(zip(as_bytes(images), valid, strict=True)):
            window = (slice(0, int(inside.any(1).sum())), slice(0, int(inside.any(0).sum())))
            refined = self(image[None, :, *window], [maps[i : i + 1, :, *window] for maps in log_probs])
            for ids, beliefs in zip(found, refined, strict=True):
                ids[i][window] = beliefs[0].argmax(0)
        return found

    def _block(self, images: Tensor, log_probs: Sequence[Tensor]) -> list[Tensor]:
        count, _, height, width = images.shape
        classes = [maps.shape[1] for maps in log_probs]
        with torch.autocast(images.device.type, enabled=False):
            logits = torch.cat([-unary(maps, (height, width)) for maps in log_probs], dim=1)
            logits = logits.permute(0, 2, 3, 1).reshape(-1, sum(classes)).contiguous()
            kernels = self._kernels(images)
            beliefs = _softmax(logits, classes)
            for _ in range(self.constants.iterations):
                total = logits
                for kernel in kernels:
                    total = kernel.add_to(total, beliefs)
                beliefs = _softmax(total, classes)
            beliefs = beliefs.view(count, height, width, -1).permute(0, 3, 1, 2)
            return [part.contiguous() for part in beliefs.split(classes, dim=1)]

    def _kernels(self, images: Tensor) -> list[Lattice]:
        rules, kernels = self.constants, []
        if rules.gauss_weight:
            kernels.append(self._spatial_lattice(images))
        if rules.bilateral_weight:
            place = _places(images) / rules.bilateral_sxy
            # Blue, green, red: the order of the releases, which the lattice's approximation feels.
            colour = images.flip(1).permute(0, 2, 3, 1).reshape(len(images), -1, 3).float() / rules.bilateral_srgb
            points = torch.cat([place.expand(len(images), -1, -1), colour], dim=2)
            kernels.append(Lattice(points, rules.bilateral_weight))
        return kernels

    def _spatial_lattice(self, images: Tensor) -> Lattice:
        key = (*images.shape, images.device)
        if key not in self._spatial:
            points = (_places(images) / self.constants.gauss_sxy).expand(len(images), -1, -1)
            self._spatial[key] = Lattice(points, self.constants.gauss_weight)
            if len(self._spatial) > KEPT_SIZES:
                self._spatial.popitem(last=False)
        self._spatial.move_to_end(key)
        return self._spatial[key]


def as_bytes(images: Tensor) -> Tensor:
    """Pictures in 0..1 as uint8: what the file held. (The releases truncate, and lose one where rounding hits.)"""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


def unary(log_probs: Tensor, size: tuple[int, int]) -> Tensor:
    """-log p of the resized log-probabilities, p not below 1e-5: [B,K,h,w] -> [B,K,H,W]."""
    return -readout.upsample(log_probs, size).softmax(1).clamp(SMALLEST, 1.0).log()


def _softmax(logits: Tensor, classes: list[int]) -> Tensor:
    """Softmax over each read-out's classes, which lie side by side in [N, sum K]."""
    if len(classes) == 1:
        return logits.softmax(1)
    return torch.cat([part.softmax(1) for part in logits.split(classes, dim=1)], dim=1)


def _places(images: Tensor) -> Tensor:
    """x and y of every pixel, row by row: [1,H*W,2] float32."""
    height, width = images.shape[-2:]
    y = torch.arange(height, device=images.device, dtype=torch.float32).repeat_interleave(width)
    x = torch.arange(width, device=images.device, dtype=torch.float32).repeat(height)
    return torch.stack([x, y], dim=1)[None]


def _scaled(matrix: Tensor, factors: Tensor) -> Tensor:
    return _csr(matrix.crow_indices(), matrix.col_indices(), matrix.values() * factors, tuple(matrix.shape))


def _csr(crow: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Columns need no order within a row: neither MKL nor cuSPARSE asks for it. 32 bits spare a copy a product."""
    return torch.sparse_csr_tensor(crow.int(), columns.int(), values, shape, check_invariants=False)


def _matrices(points: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
    """The filter of points [B,N,d] as sparse matrices: splat [M,B*N], d + 1 blurs [M,M], slice [B*N,M]."""
    count, per_picture, d = points.shape
    remainder, rank, weights = _simplices(points.reshape(-1, d))
    pixels = len(weights)
    steps = torch.arange(d + 1, device=points.device)
    # Vertex k of a simplex: + k where the rank is at most d - k, else k - d - 1; the last coordinate follows from them.
    keys = remainder[:, None, :d] + torch.where(
        rank[:, None, :d] <= d - steps[:, None], steps[:, None], steps[:, None] - d - 1
    )
    low, high = keys.amin((0, 1)) - d, keys.amax((0, 1)) + d
    extent = (high - low + 1).tolist()
    radix, scale = [], 1
    for side in reversed(extent):
        radix.insert(0, scale)
        scale *= side
    if scale * count >= LARGEST_KEY:
        raise ConfigError(
            f"evaluation.crf_constants: the kernels are so narrow that their lattice has {scale:.0e} places; "
            "raise gauss_sxy, bilateral_sxy or bilateral_srgb"
        )
    radix_row = torch.tensor(radix, device=points.device)
    hashed = ((keys - low) * radix_row).sum(2)
    if count > 1:
        hashed = hashed + (torch.arange(count, device=points.device) * scale).repeat_interleave(per_picture)[:, None]
    ordered, order = hashed.flatten().sort(stable=True)
    vertices, run, members = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    place = torch.empty_like(run).scatter_(0, order, run)
    shape = (len(vertices), pixels)
    crow = torch.arange(pixels + 1, device=points.device) * (d + 1)
    slicing = _csr(crow, place, weights.flatten() / (1 + 2.0**-d), shape[::-1])
    splat = _csr(_row_starts(members), order // (d + 1), weights.flatten()[order], shape)
    blurs = []
    for axis in range(d + 1):
        offset = sum(radix) - (d + 1) * (radix[axis] if axis < d else 0)  # key + 1 everywhere, - d on the axis itself
        blurs.append(_blur(vertices, abs(offset)))
    return splat, blurs, slicing


def _simplices(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around every point [N,d]: its remainder-0 vertex [N,d+1] and ranks [N,d+1] (int64), weights [N,d+1].

    float32 in the order of the library's operations, so that points on an edge fall to the same side.
    """
    d = points.shape[1]
    spread = (2.0 / 3.0) ** 0.5 * (d + 1)
    scaled = points * torch.tensor([spread / ((i + 2) * (i + 1)) ** 0.5 for i in range(d)], device=points.device)
    elevated = torch.empty(len(points), d + 1, device=points.device)
    total = torch.zeros(len(points), device=points.device)
    for j in range(d, 0, -1):
        elevated[:, j] = total - j * scaled[:, j - 1]
        total = total + scaled[:, j - 1]
    elevated[:, 0] = total
    nearest = torch.round(elevated / (d + 1)).long()
    remainder = nearest * (d + 1)
    excess = nearest.sum(1, keepdim=True)
    order = (elevated - remainder).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(d + 1, device=points.device).expand_as(order))
    rank = rank + excess
    wrap = (rank < 0).long() - (rank > d).long()
    rank, remainder = rank + (d + 1) * wrap, remainder + (d + 1) * wrap
    inside = (elevated - remainder) / (d + 1)
    weights = torch.zeros(len(points), d + 2, device=points.device)
    weights.scatter_add_(1, d - rank, inside)
    weights.scatter_add_(1, d + 1 - rank, -inside)
    weights[:, 0] += 1 + weights[:, d + 1]
    return remainder, rank, weights[:, : d + 1]


def _row_starts(members: Tensor) -> Tensor:
    """Where the rows of a CSR matrix begin, from how many entries each has."""
    starts = members.new_zeros(len(members) + 1)
    torch.cumsum(members, 0, out=starts[1:])
    return starts


def _blur(vertices: Tensor, offset: int) -> Tensor:
    """value + half of both neighbours along one axis, whose keys lie `offset` away; absent ones count as 0."""
    count = len(vertices)
    own = torch.arange(count, device=vertices.device)
    behind = torch.searchsorted(vertices, vertices + offset).clamp_(max=count - 1)
    has_behind = vertices[behind] == vertices + offset
    before, has_before = torch.zeros_like(own), torch.zeros_like(has_behind)
    before[behind[has_behind]] = own[has_behind]
    has_before[behind[has_behind]] = True
    columns = torch.stack([before, own, behind], dim=1)
    present = torch.stack([has_before, torch.ones_like(has_before), has_behind], dim=1)
    values = torch.tensor([0.5, 1.0, 0.5], device=vertices.device).expand(count, 3)[present]
    return _csr(_row_starts(present.sum(1)), columns[present], values, (count, count))
