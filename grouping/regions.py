"""Over-segmentations of a picture without learning: contour regions for methods that sort pixels into segments.

The published runs take regions of an edge detector and its ultrametric contour map, whose recipes need MATLAB. The
sources here are replacements of scikit-image: `felzenszwalb` and `watershed` follow contours, `slic` gives compact
superpixels (an ablation). As in the recipe of HSG the threshold is raised until a picture has few enough regions.
Source: HSG (CVPR 2022).
"""

import numpy as np
from scipy import ndimage
from skimage import graph, segmentation

from common.errors import ConfigError, one_of
from common.spec import RegionSpec

MARKERS = 400
"""Basins that the watershed starts from."""
BLUR = 2.0
"""Standard deviation in px of the blur before the watershed's gradient."""


def over_segment(image: np.ndarray, spec: RegionSpec) -> np.ndarray:
    """Regions of a picture uint8 [H,W,3]: int32 [H,W], ids 0..R-1 from the top left; R is at most `spec.most`.

    `felzenszwalb` tries the scales of `spec.thresholds` in turn, `watershed` the merging thresholds, until R is small
    enough; the last one is kept in any case, so R may be larger there. `slic` asks for `spec.most` at once and gets
    about as many. The same for the same picture, always.

    Raises:
        ConfigError: a source that computes nothing, or no threshold.
    """
    check_spec(spec)
    if spec.source == "slic":
        found = segmentation.slic(image, n_segments=spec.most, compactness=spec.compactness, start_label=0)
        return ordered(found)
    thresholds = sorted(spec.thresholds)
    basins = gradient = None
    if spec.source == "watershed":
        gradient = colour_gradient(image)
        basins = segmentation.watershed(gradient, markers=MARKERS)
    for threshold in thresholds:
        if spec.source == "felzenszwalb":
            found = segmentation.felzenszwalb(image, scale=threshold, sigma=spec.sigma, min_size=spec.min_size)
        else:
            found = merged(basins, gradient, threshold)
        if found.max() - found.min() + 1 <= spec.most:
            break
    return ordered(found)


def check_spec(spec: RegionSpec) -> None:
    """Raises ConfigError for values that no over-segmentation can be made with."""
    one_of("method.regions.source", spec.source, ("felzenszwalb", "watershed", "slic", "folder"))
    if spec.source == "folder":
        if not spec.root:
            raise ConfigError("method.regions.source=folder: set method.regions.root to the folder of region files")
        return
    if spec.most < 1:
        raise ConfigError(f"method.regions.most={spec.most}: must be at least 1")
    if spec.source != "slic" and (not spec.thresholds or min(spec.thresholds) <= 0):
        raise ConfigError(
            f"method.regions.thresholds={list(spec.thresholds)}: expected numbers above 0, such as [100,300,1000]"
        )
    for name in ("sigma", "min_size"):
        if getattr(spec, name) < 0:
            raise ConfigError(f"method.regions.{name}={getattr(spec, name):g}: must not be negative")
    if spec.compactness <= 0:
        raise ConfigError(f"method.regions.compactness={spec.compactness:g}: must be above 0")


def ordered(ids: np.ndarray) -> np.ndarray:
    """The same regions with ids 0..R-1 in the order of their first pixel: int32 [H,W]."""
    _, first, dense = np.unique(ids, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return rank[dense.reshape(ids.shape)]


def colour_gradient(image: np.ndarray) -> np.ndarray:
    """Strength of colour edges in 0..1, float32 [H,W]: the largest of the blurred channels, 1 at the 99.5 %."""
    smooth = ndimage.gaussian_filter(image.astype(np.float32), (BLUR, BLUR, 0))
    slopes = [ndimage.convolve1d(smooth, [-1, 0, 1], axis=axis) for axis in (0, 1)]
    # Scharr: the slope along one axis, smoothed by (3, 10, 3) / 16 along the other.
    slopes = [ndimage.convolve1d(slope, [3 / 16, 10 / 16, 3 / 16], axis=1 - axis) for axis, slope in enumerate(slopes)]
    strength = np.hypot(*slopes).max(axis=2)
    return np.clip(strength / max(float(np.percentile(strength, 99.5)), 1e-6), 0, 1)


def merged(basins: np.ndarray, gradient: np.ndarray, threshold: float) -> np.ndarray:
    """Neighbouring basins joined, the weakest border first, until every border left is at least `threshold` strong."""

    def weight(rag: graph.RAG, source: int, target: int, neighbour: int) -> dict[str, float]:
        """The mean strength of a joined border, weighted by the pixels of both parts."""
        absent = {"weight": 0.0, "count": 0}
        one, two = (rag[node].get(neighbour, absent) for node in (source, target))
        count = one["count"] + two["count"]
        return {"count": count, "weight": (one["count"] * one["weight"] + two["count"] * two["weight"]) / count}

    # The graph is changed while it is merged, so every threshold starts from a new one.
    return graph.merge_hierarchical(
        basins,
        graph.rag_boundary(basins, gradient),
        thresh=threshold,
        rag_copy=False,
        in_place_merge=True,
        merge_func=lambda *_: None,
        weight_func=weight,
    )
