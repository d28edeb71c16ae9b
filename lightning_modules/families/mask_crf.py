"""MaskCut's masks on the pixels: a dense CRF around each, as CutLER's release has it (Wang et al., CVPR 2023)."""

import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from evaluation.crf import Constants, DenseCRF, as_bytes

RELEASED = Constants(
    iterations=10, gauss_sxy=3.0, gauss_weight=7.0, bilateral_sxy=50.0, bilateral_srgb=5.0, bilateral_weight=10.0
)
LEAST_OVERLAP = 0.5
"""Overlap with itself before the CRF below which a mask is dropped."""


class MaskCRF:
    """Draws the borders of masks along those of the picture; keeps the spatial lattices of the sizes it has seen."""

    def __init__(self) -> None:
        self.crf = DenseCRF(RELEASED)

    @torch.no_grad()
    def __call__(self, image: Tensor, masks: Tensor) -> Tensor:
        """Masks bool [m,H,W] of a picture [3,H,W] in 0..1, from masks [n,h,w]; m <= n.

        Each by itself, so two may share pixels: to H x W by nearest neighbour, ten iterations from the probabilities
        softmax(1 - mask, mask), that is 0.73 for what the mask says; holes are filled. Left out is what overlaps the
        mask before the CRF by less than half.
        """
        size = tuple(image.shape[-2:])
        if not len(masks):
            return masks.new_zeros(0, *size)
        whole = F.interpolate(masks[None].float(), size, mode="nearest")[0]
        beliefs = self.crf(as_bytes(image)[None], [torch.stack([1 - mask, mask])[None] for mask in whole])
        before = whole > 0
        found = torch.stack([filled(own[0, 1] > own[0, 0]) for own in beliefs])
        common, either = (found & before).sum((1, 2)), (found | before).sum((1, 2))
        return found[common >= LEAST_OVERLAP * either]


def filled(mask: Tensor) -> Tensor:
    """A mask bool [H,W] without its holes."""
    return torch.from_numpy(ndimage.binary_fill_holes(mask.cpu().numpy())).to(mask.device)
