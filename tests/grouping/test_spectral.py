"""Affinities by loops, and cuts of pictures with planted objects."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import ConfigError, LabelfreeError
from grouping import eigen, masks, spectral

SIZE = (14, 16)


def planted(count=2, size=SIZE, noise=0.05, seed=0):
    """Feature maps [B,32,h,w] of a ground with one object, and the object's mask bool [B,h,w]."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(count, *size, dtype=torch.bool)
    for number in range(count):
        truth[number, 3 : 9 + number % 3, 4:10] = True
    kinds = F.normalize(torch.randn(count, 2, 32, generator=generator), dim=2)
    maps = torch.where(truth[:, None], kinds[:, 0, :, None, None], kinds[:, 1, :, None, None])
    return maps + noise * torch.randn(maps.shape, generator=generator), truth


def rows_of(maps):
    return maps.flatten(2).mT


def test_feature_affinity_by_hand():
    rows = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [-3.0, 3.0], [0.0, 1.0]]])
    half = math.sqrt(0.5)
    cosines = [[1, 0, -half, 0], [0, 0, 0, 0], [-half, 0, 1, half], [0, 0, half, 1]]
    signed = spectral.feature_affinity(rows, nonnegative=False)
    torch.testing.assert_close(signed[0], torch.tensor(cosines))
    torch.testing.assert_close(spectral.feature_affinity(rows), signed.clamp(min=0))
    raw = torch.tensor([[4.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 18, 3], [0, 0, 3, 1]]) / 18
    torch.testing.assert_close(spectral.feature_affinity(rows, normalize=False)[0], raw)
    assert not spectral.feature_affinity(torch.zeros(1, 3, 2)).any()


def test_threshold_affinity_by_hand():
    rows = F.normalize(torch.tensor([[[1.0, 0.0], [1.0, 1.0], [-1.0, 0.1]]]), dim=2)
    binary = spectral.threshold_affinity(rows, 0.2, 1e-5)[0]
    torch.testing.assert_close(binary, torch.tensor([[1, 1, 1e-5], [1, 1, 1e-5], [1e-5, 1e-5, 1]]))
    weighted = spectral.threshold_affinity(rows, 0.2, 1e-5, binary=False)[0]
    half = math.sqrt(0.5)
    torch.testing.assert_close(weighted, torch.tensor([[1, half, 1e-5], [half, 1, 1e-5], [1e-5, 1e-5, 1]]))


@pytest.mark.parametrize("nodes", [256, 600])
def test_affinities_of_graphs_of_several_strips(nodes):
    features = torch.randn(2, nodes, 5, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    cosines = F.cosine_similarity(features[:, :, None], features[:, None], dim=3)
    expected = {
        spectral.threshold_affinity(features, 0.2, 1e-3): (cosines > 0.2).double().clamp(min=1e-3),
        spectral.threshold_affinity(features, 0.2, 1e-3, binary=False): torch.where(cosines < 0.2, 1e-3, cosines),
        spectral.feature_affinity(features): cosines.clamp(min=0),
        spectral.feature_affinity(features, nonnegative=False): cosines,
    }
    for found, wanted in expected.items():
        torch.testing.assert_close(found, wanted)


def test_colour_affinity_by_loops():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(2, 3, 5, 6, generator=generator)
    found = spectral.colour_affinity(pictures, ((4, 2.0), (3, 0.1)))
    for picture, weights in zip(pictures, found, strict=True):
        wanted = torch.zeros(30, 30)
        for neighbours, scale in ((4, 2.0), (3, 0.1)):
            points = [[*picture[:, y, x].tolist(), scale * x / 5, scale * y / 4] for y in range(5) for x in range(6)]
            for i, one in enumerate(points):
                for j in sorted(range(30), key=lambda j: math.dist(one, points[j]))[:neighbours]:
                    wanted[i, j] += 1
                    wanted[j, i] += 1
        assert torch.equal(weights, wanted)
    assert torch.equal(found.diagonal(dim1=1, dim2=2), torch.full((2, 30), 4.0))
    assert spectral.colour_affinity(torch.rand(1, 3, 2, 2)).tolist() == [[[4.0] * 4] * 4]  # fewer than neighbours


def test_gaussian_affinity_by_loops():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(2, 3, 4, 5, generator=generator)
    found = spectral.gaussian_affinity(maps, 0.5, 4.0, 2.5)
    for picture, weights in zip(maps, found, strict=True):
        for i in range(20):
            for j in range(20):
                one, other = divmod(i, 5), divmod(j, 5)
                apart = float((picture[:, one[0], one[1]] - picture[:, other[0], other[1]]).square().sum())
                near = math.dist(one, other)
                wanted = math.exp(-apart / 0.5 - near**2 / 4.0) if near < 2.5 else 0.0
                assert float(weights[i, j]) == pytest.approx(wanted, rel=1e-4, abs=1e-7)


def test_upsampled_maps_are_made_unit_before():
    maps = torch.randn(1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(spectral.upsampled(maps, (3, 3)), F.normalize(maps, dim=1))
    assert torch.equal(spectral.upsampled(maps, (3, 3), unit=False), maps)
    fine = spectral.upsampled(maps, (6, 6))
    assert fine.shape == (1, 4, 6, 6)
    assert float(fine.norm(dim=1).min()) < 0.99


@pytest.mark.parametrize("size", [SIZE, (10, 30)])  # dense and by blocks
def test_the_second_vector_finds_the_object(size):
    maps, truth = planted(size=size)
    found = eigen.smallest(spectral.feature_affinity(rows_of(maps)), 2)
    vectors = found.vectors[:, 1].view(2, *size)
    assert torch.equal(vectors > 0, truth)  # the smaller part is positive
    for vector, wanted in zip(vectors, truth, strict=True):
        mask, box = spectral.localise(vector, 8, (size[0] * 8, size[1] * 8 - 3))
        assert torch.equal(mask, wanted)
        assert torch.equal(box, masks.tight_box(wanted, 8))
        assert torch.equal(spectral.localise(-vector, 8, size)[0], wanted)  # more than half is turned


def test_foreground_of_a_vector_without_two_sides():
    assert spectral.foreground(torch.ones(2, 3)).all()
    assert spectral.foreground(-torch.ones(2, 3)).all()


@pytest.mark.parametrize("size", [SIZE, (10, 30)])
@pytest.mark.parametrize("binary", [True, False])
def test_token_cut_finds_the_object(size, binary):
    maps, truth = planted(size=size)
    graph = spectral.threshold_affinity(rows_of(maps), 0.2, binary=binary)
    cut = spectral.token_cut(graph, size)
    dense = spectral.token_cut(graph, size, solver="dense")
    torch.testing.assert_close(cut.values, dense.values, rtol=0, atol=1e-5)
    torch.testing.assert_close(cut.vectors, dense.vectors, rtol=0, atol=1e-5)
    assert torch.equal(cut.masks, dense.masks)
    assert torch.equal(cut.masks, truth)
    assert bool(cut.masks.flatten(1).gather(1, cut.seeds[:, None]).all())
    assert bool((cut.bipartition == (cut.vectors > cut.vectors.mean((1, 2), keepdim=True))).all())
    assert torch.equal(cut.vectors.flatten(1).abs().argmax(1), cut.seeds)


def test_token_cut_where_the_second_and_third_value_nearly_meet():
    """Three parts of nearly the same size that only the floor of the graph joins: float32 cannot tell the vectors."""
    part = torch.tensor([0] * 100 + [1] * 101 + [2] * 99)
    graph = (part[:, None] == part).float().clamp(min=1e-5)[None]
    weights = graph.double()
    half = weights.sum(2).rsqrt()
    values, vectors = torch.linalg.eigh(half[:, :, None] * weights * half[:, None])
    wanted = (vectors[0, :, -2] * half[0]).view(10, 30)
    cut = spectral.token_cut(graph, (10, 30))
    torch.testing.assert_close(cut.values[0].double(), 1 - values[0, [-2, -3]], rtol=0, atol=1e-6)
    cosine = F.cosine_similarity(cut.vectors.double().flatten(), wanted.flatten(), dim=0).abs()
    assert float(cosine) > 1 - 1e-6


def test_constant_features_give_finite_cuts_and_segments():
    maps = torch.ones(2, 4, *SIZE)
    cut = spectral.token_cut(spectral.threshold_affinity(rows_of(maps)), SIZE)
    assert bool(cut.vectors.isfinite().all())
    found = eigen.smallest(spectral.feature_affinity(rows_of(maps)), 3)
    labels = spectral.multi_region(found.vectors[0].view(3, *SIZE), 4, seed=0, index=0)
    assert labels.shape == SIZE


def test_features_that_are_not_finite_and_grids_that_are_too_small():
    maps = torch.ones(2, 4, 3, 3)
    maps[1, 1, 2, 2] = float("nan")
    for work in (
        lambda: spectral.feature_affinity(rows_of(maps)),
        lambda: spectral.threshold_affinity(rows_of(maps)),
        lambda: spectral.gaussian_affinity(maps, 1.0, 1.0, 2.0),
        lambda: spectral.colour_affinity(maps[:, :3]),
    ):
        with pytest.raises(LabelfreeError) as caught:
            work()
        assert str(caught.value) == (
            "affinity: the features of picture 1 of 2 of the batch are not finite; "
            "look for a picture or a precision that gives such features"
        )
    with pytest.raises(ConfigError) as caught:
        spectral.token_cut(torch.ones(1, 1, 1), (1, 1))
    assert str(caught.value) == (
        "a grid of 1 x 1 patches: a cut needs 3 patches; give larger pictures or another patch"
    )


def test_segments_are_the_parts_of_a_picture_with_the_background_first():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.zeros(12, 12, dtype=torch.int64)
    wanted[2:6, 2:6], wanted[7:10, 3:10] = 1, 2
    kinds = torch.randn(3, 16, generator=generator)
    rows = kinds[wanted.flatten()] + 0.1 * torch.randn(144, 16, generator=generator)
    found = eigen.smallest(spectral.feature_affinity(rows[None]), 3)
    vectors = found.vectors[0].view(3, 12, 12)
    labels = spectral.multi_region(vectors, 3, seed=0, index=5)
    assert not labels[wanted == 0].any()
    assert sorted(labels[wanted == part].unique().tolist() for part in (1, 2)) == [[1], [2]]
    assert torch.equal(labels, spectral.multi_region(vectors, 3, seed=0, index=5))
    assert spectral.multi_region(vectors[:, :1, :2], 15, seed=0, index=0).shape == (1, 2)  # fewer patches than segments
    with pytest.raises(ConfigError) as caught:
        spectral.multi_region(vectors[:1], 3, seed=0, index=0)
    assert str(caught.value) == "spectral.k=1: segments need at least 2 eigenvectors; raise spectral.k"


def test_adaptive_count_leaves_the_first_gap_out():
    assert spectral.adaptive_count(torch.tensor([0.0, 0.5, 0.6, 0.9, 1.0])) == 3
    assert spectral.adaptive_count(torch.tensor([0.0, 0.5, 0.9])) == 2
    with pytest.raises(ConfigError) as caught:
        spectral.adaptive_count(torch.zeros(2))
    assert str(caught.value) == "spectral.k=2: the gap of eigenvalues needs at least 3; raise spectral.k"


@pytest.mark.parametrize("components", [0, 3])
def test_classes_of_regions_leave_zero_to_the_background(components):
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(60) % 4
    vectors = 5 * torch.randn(4, 10, generator=generator)[own] + 0.1 * torch.randn(60, 10, generator=generator)
    classes = spectral.region_classes(vectors, 4, seed=0, components=components)
    assert sorted(classes.unique().tolist()) == [1, 2, 3, 4]
    pairs = set(zip(own.tolist(), classes.tolist(), strict=True))
    assert len(pairs) == 4
    released = spectral.region_classes(vectors, 4, seed=0, components=components, reserve_background=False)
    assert torch.equal(released, classes - 1)
    painted = spectral.paint(torch.tensor([[0, 2], [5, 2]]), torch.tensor([2, 5]), torch.tensor([7, 3]))
    assert painted.tolist() == [[0, 7], [3, 7]]


def test_more_components_than_there_are():
    with pytest.raises(ConfigError) as caught:
        spectral.region_classes(torch.randn(5, 10), 2, seed=0, components=6)
    assert str(caught.value) == "method.regions.pca=6: 5 regions of 10 channels have 5 components; lower it"


def test_the_object_side_by_the_border():
    """A small group in the middle, whose side has no border, though the largest entry may lie on the other."""
    inside = torch.zeros(2, 7, 7, dtype=torch.bool)
    inside[0, 2:5, 2:5] = True
    inside[1] = True
    inside[1, 2:5, 2:5] = False
    rows = torch.nn.functional.one_hot(inside.flatten(1).long(), 2).float() + 0.01
    affinity = spectral.threshold_affinity(rows, 0.2, 1e-5)
    by_border = spectral.token_cut(affinity, (7, 7), side="border")
    middle = torch.zeros(7, 7, dtype=torch.bool)
    middle[2:5, 2:5] = True
    assert torch.equal(by_border.masks, middle.expand(2, -1, -1))
    for mask, seed in zip(by_border.masks, by_border.seeds.tolist(), strict=True):
        assert mask.flatten()[seed]
    assert torch.equal(spectral.border_share(middle[None]), torch.zeros(1, dtype=torch.float64))
    assert torch.equal(spectral.border_share(~middle[None]), torch.ones(1, dtype=torch.float64))


def test_the_border_side_is_the_peak_side_or_the_other_one():
    rows = torch.randn(12, 64, 8, generator=torch.Generator().manual_seed(1))
    affinity = spectral.threshold_affinity(rows, 0.2, 1e-5)
    peak, border = (spectral.token_cut(affinity, (8, 8), side=side) for side in spectral.SIDES)
    same = (peak.bipartition == border.bipartition).flatten(1).all(1)
    assert same.any()
    assert not same.all()
    assert torch.equal(peak.bipartition[~same], ~border.bipartition[~same])
    assert torch.equal(peak.masks[same], border.masks[same])
    shares = spectral.border_share(border.bipartition)
    assert (shares <= spectral.border_share(~border.bipartition)).all()
