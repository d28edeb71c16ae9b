"""The auxiliary CRF loss of STEGO: codes of pixels that are near and alike in colour should agree."""

import torch
from torch import Tensor

from common import chance


def random_pixels(seed: int, step: int, count: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Rows and columns of `count` pixels, drawn by (seed, step), the same for every picture of the batch."""
    draw = chance.generator(seed, "stego.crf", step)
    return tuple(torch.randint(side, (count,), generator=draw) for side in size)


def crf_matrix(
    guidance: Tensor,
    codes: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    alpha: float = 0.5,
    beta: float = 0.15,
    gamma: float = 0.05,
    appearance: float = 10.0,
    smoothness: float = 3.0,
    shift: float = 0.0,
) -> Tensor:
    """-(code similarity) * kernel of every pair of the P chosen pixels: [B,P,P]; its mean is the loss.

    kernel = appearance * exp(-dxy^2 / (2 alpha) - drgb^2 / (2 beta)) + smoothness * exp(-dxy^2 / (2 gamma)) - shift,
    distances in pixels of the guidance and in its colour units. The constants and names w1 = appearance and
    w2 = smoothness are those of the release.

    Args:
        guidance: normalised pictures [B,3,H,W], constants.
        codes: unit codes [B,D,H,W]; gradient reaches them.
        rows, columns: int64 [P], pixels.
    """
    with torch.autocast(codes.device.type, enabled=False):
        chosen = codes[:, :, rows, columns].float()
        with torch.no_grad():
            colour = guidance[:, :, rows, columns].float()
            place = torch.stack([rows, columns]).to(colour)
            far = (place[:, :, None] - place[:, None, :]).square().sum(0)
            unlike = (colour[:, :, :, None] - colour[:, :, None, :]).square().sum(1)
            near = torch.exp(-far / (2 * alpha) - unlike / (2 * beta))
            kernel = appearance * near + smoothness * torch.exp(-far / (2 * gamma)) - shift
        return -torch.bmm(chosen.transpose(1, 2), chosen) * kernel
