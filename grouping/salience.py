"""From salience to objects: threshold, size and box of maps, after COMUS (Zadaianchuk et al., ICLR 2023); the salient
of a picture's regions, after ACSeg (Li et al., CVPR 2023)."""

import torch
from torch import Tensor

from common.errors import one_of
from grouping.masks import tight_box

NORMS = ("image", "batch", "none")
"""By what smallest and largest entry maps are stretched to 0..1: their own; those of all maps that came together, as
released, so that a mask depends on its neighbours in the batch; or not at all."""


@torch.no_grad()
def salient(maps: Tensor, threshold: float = 0.5, norm: str = "image") -> Tensor:
    """Where maps of salience [B,h,w] are above the threshold, strictly, once they are stretched: bool [B,h,w].

    norm: see NORMS; a map without any difference has no object. Raises ConfigError for an unknown norm.
    """
    one_of("norm", norm, NORMS)
    if norm == "none":
        return maps > threshold
    axes = (0, 1, 2) if norm == "batch" else (1, 2)
    low, high = maps.amin(axes, keepdim=True), maps.amax(axes, keepdim=True)
    return (maps - low) / (high - low) > threshold


def at_size(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A map [h,w] at another size [H,W]: row i takes row floor(i h / H), as OpenCV's nearest does."""
    places = [torch.arange(new, device=mask.device) * old // new for new, old in zip(size, mask.shape, strict=True)]
    return mask[places[0][:, None], places[1]]


def object_box(mask: Tensor, least: int) -> tuple[int, bool, Tensor]:
    """Area in pixels, whether it is more than `least`, and the box int64 [4] (zeros where it is not) of a mask [H,W].

    The box holds all of the mask, be it one piece or several.
    """
    area = int(mask.sum())
    keep = area > least
    return area, keep, tight_box(mask if keep else torch.zeros_like(mask))


@torch.no_grad()
def upper_of_two(scores: Tensor, there: Tensor) -> Tensor:
    """2-means of the scores of each picture's regions: which belong to the higher mean, bool [B,R].

    scores [B,R]; there bool [B,R]: regions that the picture has; the others count nothing and are False. Of all splits
    the one with the least squared distances, found exactly; of equal ones that with fewer low scores. Where all scores
    are equal, and of a single region, none is higher.
    """
    found = torch.zeros_like(there)
    for values, own, high in zip(scores.double(), there, found, strict=True):
        ordered = values[own].sort().values
        if len(ordered) < 2 or ordered[0] == ordered[-1]:
            continue
        spreads = [sum(float((part - part.mean()).square().sum()) for part in (ordered[:n], ordered[n:]))
                   for n in range(1, len(ordered))]  # fmt: skip
        high |= own & (values >= ordered[1 + spreads.index(min(spreads))])
    return found
