"""From codes at patch resolution to labels and probabilities at label resolution, without a D x H x W tensor.

Bilinear upsampling (align_corners False) is linear with weights that sum to one. So an affine classifier may run on the
patches and its K maps be upsampled; and a pixel's norm scales its cosine to every centroid alike, so the arg max over
the K upsampled dot products is the arg max of the released order (upsample the code, normalise, compare). Both are
exact up to rounding at ties (tests/evaluation/test_readout.py compares them).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from common.precision import exact, real, real_dtype

EPS = 1e-12
"""Smallest norm that a vector is divided by, as in the released probes."""
BLOCK = 1 << 24
"""Elements of upsampled score maps that are held at once (64 MiB in float32)."""


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners False: [B,K,h,w] -> [B,K,H,W], in float32 (float64 stays)."""
    maps = real(maps)
    if maps.shape[-2:] == tuple(size):
        return maps
    with torch.autocast(maps.device.type, enabled=False):
        return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def upsample_ids(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Nearest: int64 [B,h,w] -> [B,H,W]; ids below 2^24."""
    return F.interpolate(maps[:, None].float(), size=tuple(size), mode="nearest-exact").squeeze(1).long()


def predict(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The best of K score maps at every pixel: [B,K,h,w] -> int64 [B,H,W].

    `scores` are linear logits, or dot products of the un-normalised code with unit centroids. Works through the
    pictures in blocks, and through the maps of a picture too large for one block, to the same bits; no gradient.
    """
    with torch.no_grad():
        return torch.cat([best_map(block, size) for block in picture_blocks(scores, size)])


def best_map(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The first of the highest of K upsampled maps, [B,K,h,w] -> int64 [B,H,W], a block of maps at a time.

    Beside the block it holds the maximum and the ids of one picture, whatever K is. Every map is upsampled as a picture
    of one channel: torch chooses its kernel, and so the last bit, by the number of channels, never by that of pictures.
    NaN counts as the highest, as in torch.
    """
    count = max(1, BLOCK // max(1, len(scores) * size[0] * size[1]))
    best, ids, number = None, None, 0
    for maps in scores.split(count, dim=1):
        upsampled = upsample(maps.flatten(0, 1).unsqueeze(1), size).view(*maps.shape[:2], *size)
        if count >= scores.shape[1]:
            return upsampled.max(1).indices  # the first of equals too, and twice as fast on a CPU
        for value in upsampled.unbind(1):
            if best is None:
                best, ids = value.clone(), torch.zeros(value.shape, dtype=torch.int64, device=value.device)
            else:
                ids.masked_fill_((value <= best).logical_not_().logical_and_(best == best), number)
                torch.maximum(best, value, out=best)
            number += 1
    return ids


def strips(scores: Tensor, size: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """`predict` for one large picture, a band of rows at a time: [1,K,h,w] -> (first row, ids int64 [n,W]).

    Bilinear upsampling is separable, so the rows of a band are interpolated first, its columns then: equal to `predict`
    up to rounding, with BLOCK elements held at once.
    """
    first_row, second_row, low, high = interpolation(scores.shape[2], size[0], real(scores))
    step = max(1, BLOCK // (scores.shape[1] * size[1]))
    with torch.no_grad():
        for first in range(0, size[0], step):
            rows = slice(first, min(first + step, size[0]))
            above, below = real(scores[:, :, first_row[rows]]), real(scores[:, :, second_row[rows]])
            band = low[rows, None] * above + high[rows, None] * below
            yield first, best_map(band, (band.shape[2], size[1]))[0]


def log_probs(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """log_softmax over K of upsampled linear logits: [B,K,h,w] -> [B,K,H,W]."""
    return upsample(logits, size).log_softmax(1)


def cluster_log_probs(codes: Tensor, clusters: Tensor, size: tuple[int, int], alpha: float) -> Tensor:
    """log_softmax over K of alpha * cosine(upsampled code, centroid): [B,D,h,w], [K,D] -> [B,K,H,W].

    Equal to upsampling the code, then normalising it: the dot products are upsampled, and the norm of the upsampled
    code comes from `upsampled_norm`. Neither argument needs to be normalised.
    """
    cosine = upsample(dot_products(codes, clusters), size) / upsampled_norm(codes, size).unsqueeze(1)
    return (alpha * cosine).log_softmax(1)


def dot_products(codes: Tensor, clusters: Tensor) -> Tensor:
    """<z, c_k / |c_k|> with the code as it is: [B,D,h,w], [K,D] -> [B,K,h,w], float32 (float64 stays)."""
    with torch.autocast(codes.device.type, enabled=False):
        return pointwise(real(codes), F.normalize(clusters.to(real_dtype(codes)), dim=1, eps=EPS))


def cosines(codes: Tensor, clusters: Tensor) -> Tensor:
    """Cosines of codes [B,D,h,w] and centroids [K,D], -1..1: [B,K,h,w], float32 (float64 stays). Gradient reaches what
    carries any."""
    with exact(codes.device):
        return dot_products(F.normalize(real(codes), dim=1, eps=EPS), clusters)


def pointwise(codes: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product: [B,D,h,w], [K,D] -> [B,K,h,w].

    cuDNN convolutions round float32 to TF32 by default, which would change the arg max; matrix products do not.
    """
    return torch.matmul(weight, codes.flatten(2)).unflatten(2, codes.shape[2:])


def upsampled_norm(codes: Tensor, size: tuple[int, int]) -> Tensor:
    """Euclidean norm of the bilinearly upsampled code, at least 1e-12: [B,D,h,w] -> [B,H,W].

    The norm of a weighted sum of the four neighbouring patches is a quadratic form of their inner products, and the
    weights are products of a row and a column weight. So five maps of inner products at patch resolution (with itself,
    with the right, the lower and the two diagonal neighbours) are combined along rows, then along columns.
    """
    with torch.autocast(codes.device.type, enabled=False):
        z = real(codes)
        # A repeated last row and column are the neighbours of the border, as upsampling clamps there.
        padded = F.pad(z, (0, 1, 0, 1), mode="replicate")
        right, below, corner = padded[..., :-1, 1:], padded[..., 1:, :-1], padded[..., 1:, 1:]
        own = (z * z).sum(1)
        with_right = (z * right).sum(1)
        with_below = (z * below).sum(1)
        diagonals = (z * corner).sum(1) + (right * below).sum(1)

        y0, y1, low, high = interpolation(z.shape[2], size[0], z)
        low, high = low[:, None], high[:, None]
        squared = low**2 * own[:, y0] + high**2 * own[:, y1] + 2 * low * high * with_below[:, y0]
        product = low**2 * with_right[:, y0] + high**2 * with_right[:, y1] + low * high * diagonals[:, y0]

        x0, x1, low, high = interpolation(z.shape[3], size[1], z)
        form = low**2 * squared[..., x0] + high**2 * squared[..., x1] + 2 * low * high * product[..., x0]
        return form.clamp(min=EPS**2).sqrt()


def interpolation(source: int, target: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both source positions and their weights for every target position along one axis (align_corners False)."""
    place = (torch.arange(target, device=like.device, dtype=like.dtype) + 0.5) * (source / target) - 0.5
    place = place.clamp(min=0)
    first = place.floor().long().clamp(max=source - 1)
    high = (place - first).clamp(0, 1)
    return first, (first + 1).clamp(max=source - 1), 1 - high, high


def upsampling(source: int, target: int, like: Tensor) -> Tensor:
    """Bilinear upsampling along one axis as a matrix [target,source], the identity for equal sizes."""
    first, second, low, high = interpolation(source, target, like)
    places = torch.arange(source, device=like.device)
    return low[:, None] * (first[:, None] == places) + high[:, None] * (second[:, None] == places)


def stretched(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ maps @ columns^T: [B,K,h,w] with two matrices of `upsampling`, or their transposes. Square ones are left
    out."""
    maps = maps if columns.shape[0] == columns.shape[1] else torch.matmul(maps, columns.T)
    return maps if rows.shape[0] == rows.shape[1] else torch.matmul(rows, maps)


def valid_patches(valid: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches that lie for half or more on the picture and not on padding: bool [B,H,W] -> bool [B,h,w]."""
    return F.adaptive_avg_pool2d(valid[:, None].float(), grid)[:, 0] >= 0.5


def flip_average(code: Tensor, code_of_flipped: Tensor) -> Tensor:
    """Mean of a picture's code and the mirrored code of its mirror image, both [B,D,h,w], before any probe (STEGO)."""
    return (code + code_of_flipped.flip(-1)) / 2


def winners(scores: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The best cluster of every patch and the cosine to it: [B,K,h,w] dot products, [B,D,h,w] -> two [B,h,w]."""
    best, cluster = scores.detach().max(1)
    norm = torch.linalg.vector_norm(codes.detach().to(best.dtype), dim=1)
    return cluster, best / norm.clamp(min=EPS)


def picture_blocks(scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
    """[B,K,h,w] in runs of pictures whose upsampled maps stay within BLOCK elements (one picture at least)."""
    return scores.split(max(1, BLOCK // max(1, scores.shape[1] * size[0] * size[1])))
