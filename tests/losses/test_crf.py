"""The auxiliary CRF loss against its formula."""

import math

import torch
import torch.nn.functional as F

from losses.crf import crf_matrix, random_pixels


def test_equals_the_formula_for_a_pair():
    generator = torch.Generator().manual_seed(0)
    guidance = torch.randn(2, 3, 4, 5, generator=generator)
    codes = F.normalize(torch.randn(2, 6, 4, 5, generator=generator), dim=1).requires_grad_()
    rows, columns = torch.tensor([0, 1, 3]), torch.tensor([4, 4, 0])
    matrix = crf_matrix(guidance, codes, rows, columns, shift=0.25)
    far = 1.0  # (0, 4) and (1, 4)
    unlike = float((guidance[1, :, 0, 4] - guidance[1, :, 1, 4]).square().sum())
    kernel = 10 * math.exp(-far / (2 * 0.5) - unlike / (2 * 0.15)) + 3 * math.exp(-far / (2 * 0.05)) - 0.25
    cosine = float((codes.detach()[1, :, 0, 4] * codes.detach()[1, :, 1, 4]).sum())
    assert matrix.shape == (2, 3, 3)
    torch.testing.assert_close(matrix[1, 0, 1].item(), -cosine * kernel, rtol=1e-5, atol=1e-7)
    matrix.mean().backward()
    assert codes.grad.abs().sum() > 0


def test_pixels_belong_to_the_step_and_lie_in_the_picture():
    rows, columns = random_pixels(0, 3, 500, (7, 9))
    assert (int(rows.min()), int(rows.max())) == (0, 6)
    assert (int(columns.min()), int(columns.max())) == (0, 8)
    assert torch.equal(rows, random_pixels(0, 3, 500, (7, 9))[0])
    assert not torch.equal(rows, random_pixels(0, 4, 500, (7, 9))[0])
