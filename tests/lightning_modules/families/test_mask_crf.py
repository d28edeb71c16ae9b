"""Masks refined on the pixels: borders, holes, and what is left out."""

import pytest
import torch

from evaluation.crf import DenseCRF, as_bytes
from lightning_modules.families.mask_crf import RELEASED, MaskCRF, filled


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    """A bright rectangle, rows 10 to 40 and columns 22 to 58, on dark."""
    image = torch.full((3, 64, 80), 0.2)
    image[:, 10:40, 22:58] = 0.8
    return image


def test_a_border_moves_to_that_of_the_picture(image):
    coarse = torch.zeros(1, 8, 10, dtype=torch.bool)
    coarse[0, 1:5, 3:7] = True
    assert torch.equal(MaskCRF()(image, coarse)[0], image[0] > 0.5)


def test_holes_are_filled(image):
    marked = image.clone()
    marked[:, 18:30, 34:46] = 0.2
    coarse = torch.zeros(1, 64, 80, dtype=torch.bool)
    coarse[0] = marked[0] > 0.5
    assert torch.equal(MaskCRF()(marked, coarse)[0], image[0] > 0.5)
    ring = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    assert bool(filled(ring).all())


def test_what_the_picture_does_not_bear_out_is_left_out(image):
    masks = torch.zeros(3, 64, 80, dtype=torch.bool)
    masks[0, 0, 0] = True
    masks[1] = image[0] > 0.5
    masks[2, ::8, ::8] = True
    found = MaskCRF()(image, masks)
    assert torch.equal(found, masks[1:2])
    assert MaskCRF()(image, masks[:0]).shape == (0, 64, 80)


def test_masks_are_refined_with_the_constants_of_the_release_from_weak_probabilities():
    picture = torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(0)) * 0.4
    picture[:, 6:18, 5:20] += 0.5
    mask = torch.zeros(24, 32, dtype=torch.bool)
    mask[4:18, 6:22] = True
    kept = RELEASED
    assert (kept.iterations, kept.gauss_weight, kept.gauss_sxy) == (10, 7, 3)
    assert (kept.bilateral_weight, kept.bilateral_sxy, kept.bilateral_srgb) == (10, 50, 5)
    strength = torch.where(mask, 1.0, -1.0)  # between the two classes: 0.73 to 0.27
    logits = torch.stack([-strength / 2, strength / 2])[None]
    assert logits.softmax(1).max().item() == pytest.approx(0.731, abs=1e-3)
    wanted = filled(DenseCRF(kept)(as_bytes(picture)[None], [logits])[0][0].argmax(0) == 1)
    assert torch.equal(MaskCRF()(picture, mask[None])[0], wanted)
