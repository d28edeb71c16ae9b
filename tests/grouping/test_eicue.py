"""EiCue: eigenvectors of any map, the colours' two scales, signs."""

import pytest
import torch

from grouping import eicue, eigen


def scene(pictures: int = 2, height: int = 14, width: int = 18, seed: int = 0):
    """Codes [B,8,h,w] and pictures [B,3,8h,8w]: three strips of other colours and codes, and noise."""
    draws = torch.Generator().manual_seed(seed)
    strip = (torch.arange(width) * 3 // width).expand(height, width)
    codes = torch.randn(3, 8, generator=draws)[strip].permute(2, 0, 1)
    colours = torch.rand(3, 3, generator=draws)[strip].permute(2, 0, 1)
    codes = codes + 0.5 * torch.randn(pictures, 8, height, width, generator=draws)
    images = colours + 0.02 * torch.randn(pictures, 3, height, width, generator=draws)
    return codes, torch.nn.functional.interpolate(images.clamp(0, 1), scale_factor=8), strip


def coloured(images, size, scale="unit"):
    return eicue.colours(images, (images - 0.45) / 0.225, size, scale)


@pytest.mark.parametrize("scale", eicue.COLOURS)
def test_the_deflated_solver_agrees_with_the_full_one(scale):
    codes, images, _ = scene()
    maps = coloured(images, (14, 18), scale)
    graph = eicue.affinity(codes.flatten(2).mT, eicue.colour_affinity(maps))
    found = eigen.smallest(graph, 4)
    assert not found.dense.any()
    assert found.residuals.max() <= 1e-5
    values = torch.linalg.eigvalsh(
        torch.eye(252) - graph / graph.sum(2).sqrt()[:, None] / graph.sum(2).sqrt()[..., None]
    )
    gaps = torch.minimum(values[:, 1:4] - values[:, :3], values[:, 2:5] - values[:, 1:4])
    one, two = (eicue.vectors([codes], maps, 4, solver=solver)[0].flatten(2) for solver in ("auto", "dense"))
    torch.testing.assert_close(one.norm(dim=2), torch.ones(2, 3))
    alike = (one * two).sum(2).abs()
    assert (gaps > 1e-2).any()
    assert (alike[gaps > 1e-2] > 0.999).all()


def test_segments_are_where_colours_and_codes_change():
    codes, images, strip = scene()
    found = eicue.vectors([codes], coloured(images, (14, 18)), 3)[0]
    for picture in found:
        means = torch.stack([picture[:, strip == n].mean(1) for n in range(3)])
        within = max(float(picture[:, strip == n].std(1).max()) for n in range(3))
        assert torch.pdist(means).min() > 3 * within


def test_views_share_the_colours_and_blocks_change_nothing(monkeypatch):
    codes, images, _ = scene(3, 7, 9)
    maps = coloured(images, (7, 9))
    both = eicue.vectors([codes, codes.flip(0)], maps, 4)
    assert [tuple(part.shape) for part in both] == [(3, 3, 7, 9)] * 2
    assert torch.equal(both[0], eicue.vectors([codes], maps, 4)[0])
    monkeypatch.setattr(eicue, "_BYTES", 1)
    for one, two in zip(both, eicue.vectors([codes, codes.flip(0)], maps, 4), strict=True):
        torch.testing.assert_close(one, two)


def test_released_colours_are_nearly_one_constant():
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    released, unit = (eicue.colour_affinity(coloured(images, (8, 8), scale)) for scale in ("released", "unit"))
    assert released.min() > 0.95
    assert unit.mean() < 0.3
    for graph in (released, unit):
        assert torch.equal(graph.diagonal(dim1=1, dim2=2), torch.ones(2, 64))


def test_longer_codes_make_the_same_graph_and_codes_without_length_are_joined_by_colour():
    codes, images, _ = scene(1, 4, 5)
    rows, colour = codes.flatten(2).mT, eicue.colour_affinity(coloured(images, (4, 5)))
    torch.testing.assert_close(eicue.affinity(3 * rows, colour), eicue.affinity(rows, colour))
    assert torch.equal(eicue.affinity(0 * rows, colour), colour)


def test_signs():
    rows = torch.tensor([[[1.0, 1, 1, -2], [-3, -1, -1, -1]], [[1, 1, 1, 1], [2, 2, -1, -1]]])
    assert torch.equal(eicue.signed(rows, "picture"), torch.stack([rows[0], -rows[1]]))
    vector = eicue.signed(rows)
    assert torch.equal(vector, torch.stack([rows[0] * torch.tensor([[-1.0], [-1]]), rows[1]]))
    assert torch.equal(vector, eicue.signed(-rows))
