"""Masks and label maps on the grid of patches: components, boxes, the background by the border.

Components and morphology are scipy's, on the host: maps of some thousand patches are small. Boxes are (x0, y0, x1, y1)
with exclusive ends. Sources: TokenCut (CVPR 2022) and Deep Spectral Methods (CVPR 2022).
"""

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from common.errors import one_of

CONNECTIVITIES = (4, 8)
"""Neighbours of a place: 4 in TokenCut, 8 in the localisation of Deep Spectral."""


def components(mask: Tensor, connectivity: int) -> Tensor:
    """Connected components of a mask bool [h,w]: int64 [h,w], 0 outside, then 1, 2, ... in raster order."""
    one_of("connectivity", connectivity, CONNECTIVITIES)
    structure = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    found = ndimage.label(mask.cpu().numpy(), structure)[0]
    return torch.from_numpy(found).to(mask.device, torch.int64)


def component_at(mask: Tensor, place: int, connectivity: int) -> Tensor:
    """The component of a mask bool [h,w] that holds the place (flat index): bool [h,w], empty where the mask is not."""
    found = components(mask, connectivity)
    own = found.flatten()[place]
    return (found == own) & (own > 0)


def largest_component(mask: Tensor, connectivity: int) -> Tensor:
    """The component of most places, of equals the first in raster order: bool [h,w]; empty where the mask is."""
    found = components(mask, connectivity)
    sizes = found.flatten().bincount(minlength=2)
    sizes[0] = 0
    return (found == sizes.argmax()) & mask


def without_specks(masks: Tensor, smallest: int, connectivity: int = 8) -> Tensor:
    """Masks bool [B,h,w] without their components of fewer than `smallest` places."""
    one_of("connectivity", connectivity, CONNECTIVITIES)
    # One labelling for the whole batch: the third axis connects nothing.
    structure = np.zeros((3, 3, 3), dtype=bool)
    structure[1] = ndimage.generate_binary_structure(2, 1 if connectivity == 4 else 2)
    found = ndimage.label(masks.cpu().numpy(), structure)[0]
    large = np.bincount(found.ravel()) >= smallest
    large[0] = False
    return torch.from_numpy(large[found]).to(masks.device)


def tight_box(mask: Tensor, patch: int = 1, size: tuple[int, int] | None = None) -> Tensor:
    """The box of a mask bool [h,w] in pixels: int64 [4]; zeros where the mask is empty.

    patch: pixels of a patch's side. size: height and width of the picture, to which the box is clipped.
    """
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return torch.zeros(4, dtype=torch.int64, device=mask.device)
    box = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) * patch
    if size is not None:
        height, width = size
        box = torch.minimum(box, box.new_tensor([width, height, width, height]))
    return box


def border_shares(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The labels of a map int64 [h,w], ascending, and the share of the border that each of them has, float64.

    The border is the first and last row and column; corners count twice.
    """
    lines = torch.cat([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    names = labels.unique()
    counts = (lines[:, None] == names).sum(0)
    return names, counts.double() / len(lines)


def background_first(labels: Tensor) -> Tensor:
    """The map int64 [h,w] with the label of the largest share of the border (the first of equals) and 0 swapped."""
    names, shares = border_shares(labels)
    background = names[shares.argmax()]
    return torch.where(labels == background, 0, torch.where(labels == 0, background, labels))


def region_boxes(labels: Tensor, erode: int = 2, dilate: int = 5) -> tuple[Tensor, Tensor]:
    """The regions of a map int64 [h,w] but 0, ascending, and the box of each in patches: int64 [R] and [R,4].

    A region is eroded, then dilated by the 4-neighbour cross, so many times. What lies outside the map counts as part
    of the region when it is eroded; an erosion that would leave nothing is left out. Regions are not cut into
    components.
    """
    names = labels.unique()
    names = names[names > 0]
    boxes = [_grown_box(labels == name, erode, dilate) for name in names]
    return names, torch.stack(boxes) if boxes else labels.new_zeros(0, 4)


def _grown_box(mask: Tensor, erode: int, dilate: int) -> Tensor:
    shape: np.ndarray = mask.cpu().numpy()
    for _ in range(erode):
        smaller = ndimage.binary_erosion(shape, border_value=1)
        shape = smaller if smaller.any() else shape
    for _ in range(dilate):
        shape = ndimage.binary_dilation(shape)
    return tight_box(torch.from_numpy(shape).to(mask.device))
