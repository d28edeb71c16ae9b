"""Segments against plain loops over pictures, and the promise that no value is ever waited for."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import ConfigError
from grouping import segments
from losses.vmf import vmf_nca


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def loop_kmeans(vectors, labels, count, iterations, valid, empty):
    """One picture after the other, members picked by boolean indexing."""
    results = []
    for rows, start, inside in zip(vectors, labels, valid, strict=True):
        rows, current = rows[inside], start[inside]
        for _ in range(iterations):
            similarity = torch.empty(len(rows), count, dtype=rows.dtype)
            for k in range(count):
                members = rows[current == k]
                centre = F.normalize(members.sum(0), dim=0) if len(members) else torch.zeros(rows.shape[1]).to(rows)
                similarity[:, k] = rows @ centre if len(members) or empty == "zero" else -torch.inf
            current = similarity.argmax(1)
        whole = torch.full_like(start, -1)
        whole[inside] = current
        results.append(whole)
    return torch.stack(results)


@pytest.mark.parametrize("empty", segments.EMPTY)
@pytest.mark.parametrize("grid", segments.GRIDS)
def test_kmeans_equals_a_loop_over_pictures(grid, empty):
    size, cells = (9, 11), (4, 3)
    vectors = unit(3, 99, 5)
    start = segments.grid_labels(size, cells, grid).flatten().expand(3, -1)
    count = segments.grid_count(size, cells, grid)
    valid = torch.rand(3, 99, generator=torch.Generator().manual_seed(1)) < 0.7
    valid[0] = True
    wanted = loop_kmeans(vectors, start, count, 6, valid, empty)
    assert wanted.max() > 0
    for block in (None, 1):
        found = segments.spherical_kmeans(vectors, start, count, 6, valid=valid, empty=empty, block_bytes=block)
        assert torch.equal(found, wanted)


def test_an_empty_centre_wins_against_negative_similarities_only_where_it_is_a_zero_vector():
    vectors = torch.tensor([[[1.0, 0.0], [0.98, 0.199], [-1.0, 0.0], [-0.6, 0.8]]])
    labels = torch.tensor([[0, 0, 0, 0]])
    found = {empty: segments.spherical_kmeans(vectors, labels, 2, 1, empty=empty) for empty in segments.EMPTY}
    assert found["skip"].tolist() == [[0, 0, 0, 0]]
    assert found["zero"].tolist() != found["skip"].tolist()


def test_pictures_do_not_see_each_other_and_padding_is_not_read():
    vectors, start = unit(4, 30, 6, dtype=torch.float32), torch.arange(30).remainder(5).expand(4, -1)
    together = segments.spherical_kmeans(vectors, start, 5, 4)
    assert torch.equal(together[2:3], segments.spherical_kmeans(vectors[2:3], start[2:3], 5, 4))
    valid = torch.arange(30).expand(4, -1) < 20
    other = torch.where(valid[..., None], vectors, 9.0)
    found = segments.spherical_kmeans(other, start, 5, 4, valid=valid)
    assert torch.equal(found[:, :20], segments.spherical_kmeans(vectors[:, :20], start[:, :20], 5, 4))
    assert (found[:, 20:] == -1).all()
    nothing = segments.spherical_kmeans(vectors, start, 5, 4, valid=torch.zeros_like(valid))
    assert (nothing == -1).all()


@pytest.mark.parametrize("rule", segments.GRIDS)
@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 3), (10, 12), (28, 56)])
@pytest.mark.parametrize("cells", [(1, 1), (4, 4), (5, 2), (6, 24)])
def test_a_dense_grid_has_as_many_labels_as_are_counted(rule, size, cells):
    dense = segments.grid_labels(size, cells, rule)
    raw = segments.grid_labels(size, cells, rule, dense=False)
    assert dense.unique().tolist() == list(range(segments.grid_count(size, cells, rule)))
    assert torch.equal(dense.flatten(), raw.unique(return_inverse=True)[1].flatten())


def test_grids_differ_at_the_border():
    assert segments.grid_labels((10, 1), (4, 1), "linspace").flatten().tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert segments.grid_labels((10, 1), (4, 1), "ceil").flatten().tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("order", segments.ORDERS)
def test_relabel_equals_unique(order):
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-4, 9, (5, 40), generator=generator) * 10**15
    valid = torch.rand(5, 40, generator=generator) < 0.8
    valid[3] = False
    ids, counts = segments.relabel(keys, valid, order)
    for row, inside, own, count in zip(keys, valid, ids, counts, strict=True):
        wanted, inverse = row[inside].unique(return_inverse=True)
        if order == "appearance":
            seen = list(dict.fromkeys(inverse.tolist()))
            inverse = torch.tensor([seen.index(i) for i in inverse.tolist()], dtype=torch.int64)
        assert torch.equal(own[inside], inverse)
        assert (own[~inside] == -1).all()
        assert count == len(wanted)


def test_segments_are_distinct_triples_in_order():
    generator = torch.Generator().manual_seed(0)
    clusters = torch.randint(-1, 4, (3, 50), generator=generator)
    regions = torch.randint(0, 3, (3, 50), generator=generator) * 2048**3
    found = segments.chained(*segments.segment_ids(clusters, regions)).flatten()
    triples = [
        (picture, int(c), int(r))
        for picture in range(3)
        for c, r in zip(clusters[picture], regions[picture], strict=True)
    ]
    order = sorted({triple for triple in triples if triple[1] >= 0})
    assert found.tolist() == [order.index(t) if t[1] >= 0 else -1 for t in triples]
    alone = segments.chained(*segments.segment_ids(clusters))
    assert alone.max() + 1 == sum(len(row[row >= 0].unique()) for row in clusters)


def test_sums_means_prototypes_sizes_values_and_majorities_equal_loops():
    vectors, generator = unit(60, 4), torch.Generator().manual_seed(2)
    ids = torch.randint(-1, 6, (60,), generator=generator)
    ids[ids == 3] = 2  # segment 3 has no pixel
    labels = torch.randint(0, 5, (60,), generator=generator)
    labels[labels == 4] = 255
    sums, means = segments.segment_sums(vectors, ids, 7), segments.segment_means(vectors, ids, 7)
    unit_sums, sizes = segments.prototypes(vectors, ids, 7), segments.segment_sizes(ids, 7)
    majority = segments.majority_labels(labels, ids, 7, 4)
    values = segments.segment_values(ids * 10, ids, 7)
    for s in range(7):
        mine = ids == s
        own = labels[mine & (labels != 255)]
        torch.testing.assert_close(sums[s], vectors[mine].sum(0))
        torch.testing.assert_close(means[s], vectors[mine].mean(0) if mine.any() else torch.zeros(4).double())
        torch.testing.assert_close(unit_sums[s], F.normalize(vectors[mine].sum(0), dim=0))
        assert sizes[s] == mine.sum()
        assert majority[s] == (own.bincount(minlength=4).argmax() if len(own) else -1)
        assert values[s] == (s * 10 if mine.any() else -1)
    assert sizes[3] == 0


def test_gradient_of_prototypes_reaches_the_pixels():
    ids = torch.tensor([0, 1, -1, 0, 1, 0])
    assert torch.autograd.gradcheck(
        lambda rows: segments.prototypes(rows, ids, 3), unit(6, 3).requires_grad_(), fast_mode=False
    )


def test_slots_keep_their_order_and_too_many_segments_lose_the_smallest():
    owners = torch.tensor([0, 0, 1, -1, 0, 1, 0])
    assert segments.slot_table(owners, 2, 5).tolist() == [[0, 1, 4, 6, -1], [2, 5, -1, -1, -1]]
    assert segments.slot_table(owners, 2, 2).tolist() == [[0, 1], [2, 5]]
    sizes = torch.tensor([3, 9, 1, 50, 3, 1, 8])
    assert segments.slot_table(owners, 2, 3, sizes).tolist() == [[0, 1, 6], [2, 5, -1]]
    values = torch.arange(7.0)[:, None].requires_grad_()
    rows = segments.take(values, segments.slot_table(owners, 2, 3), fill=-7)
    assert rows[..., 0].tolist() == [[0, 1, 4], [2, 5, -7]]
    rows.sum().backward()
    assert values.grad[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 0]


def test_sort_pixels_gives_gradient_and_names_its_rules():
    maps = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    regions = torch.arange(30).view(6, 5).div(15, rounding_mode="floor").expand(2, -1, -1)
    found = segments.sort_pixels(maps, (2, 2), 3, regions=regions)
    found.located.square()[..., 0].sum().backward()
    assert maps.grad.abs().sum() > 0
    assert found.counts.sum() == found.ids.max() + 1
    plain = segments.sort_pixels(maps.detach(), (1, 1), 1, regions=regions, location=None)
    assert torch.equal(plain.ids, segments.chained(*segments.relabel(regions.flatten(1))))
    for wrong, line in [
        ({"grid": "round"}, "kmeans.grid=round: not one of linspace, ceil"),
        ({"empty": "drop"}, "kmeans.empty=drop: not one of skip, zero"),
        ({"location": "yx"}, "kmeans.location=yx: not one of centred, linspace, relative"),
    ]:
        with pytest.raises(ConfigError) as error:
            segments.sort_pixels(maps, (2, 2), 1, **wrong)
        assert str(error.value) == line


class Calls(TorchDispatchMode):
    """Records the operators that ran."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names = [*getattr(self, "names", []), str(func)]
        return func(*args, **(kwargs or {}))


WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal.default")


def whole(maps, regions, valid):
    """Everything between embeddings and a table of nodes, and a loss with its gradients."""
    found = segments.sort_pixels(maps, (5, 5), 10, regions=regions, valid=valid)
    ids, count = found.ids.flatten(), maps.shape[0] * 60
    rows = segments.prototypes(found.unit.flatten(0, 1), ids, count)
    crop = torch.arange(len(maps), device=maps.device)[:, None].expand_as(found.ids).flatten()
    owners = segments.segment_values(crop, ids, count)
    sizes = segments.segment_sizes(ids, count)
    segments.majority_labels(regions.flatten(), ids, count, 4)
    segments.relabel(found.clusters, order="appearance")
    vmf_nca(found.unit.flatten(0, 1), rows, owners, ids, 10.0).backward()
    return segments.take(rows, segments.slot_table(owners, len(maps), 20, sizes))


def test_no_value_is_ever_looked_at_by_the_host():
    """Tensors of the meta device have no values: whatever waits for one, or has a shape that depends on one, fails."""
    maps = torch.empty(8, 16, 14, 14, device="meta", requires_grad=True)
    regions = torch.empty(8, 14, 14, dtype=torch.int64, device="meta")
    valid = torch.empty(8, 14, 14, dtype=torch.bool, device="meta")
    assert whole(maps, regions, valid).shape == (8, 20, 16)
    with pytest.raises((RuntimeError, NotImplementedError)):  # the test can fail
        whole(maps, regions, valid).sum().item()
    with pytest.raises((RuntimeError, NotImplementedError)):
        maps[maps > 0]


def test_the_number_of_operations_does_not_grow_with_the_pictures():
    counts = []
    for pictures in (2, 16):
        maps = torch.empty(pictures, 16, 14, 14, device="meta", requires_grad=True)
        regions = torch.empty(pictures, 14, 14, dtype=torch.int64, device="meta")
        with Calls() as calls:
            whole(maps, regions, torch.empty(pictures, 14, 14, dtype=torch.bool, device="meta"))
        counts.append(len(calls.names))
        assert not [name for name in calls.names if any(word in name for word in WAITING)]
    assert counts[0] == counts[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_nothing_waits_for_the_gpu():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(8, 16, 14, 14, generator=generator).requires_grad_()
    regions = torch.randint(4, (8, 14, 14), generator=generator)
    valid = torch.rand(8, 14, 14, generator=generator) < 0.9
    inputs = maps.detach().cuda().requires_grad_(), regions.cuda(), valid.cuda()
    whole(*inputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = whole(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), whole(maps, regions, valid), rtol=1e-4, atol=1e-5)


def test_the_first_of_equal_centres_wins():
    vectors = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]]).repeat(2, 50, 1)
    labels = torch.tensor([[3, 1, 4, 2]]).repeat(2, 50)
    for empty in segments.EMPTY:
        found = segments.spherical_kmeans(vectors, labels, 6, 1, empty=empty)
        assert found[:, :4].tolist() == [[1, 1, 2, 2]] * 2


@pytest.mark.parametrize(("side", "cells"), [(224, 14), (448, 28), (100, 7), (225, 15), (13, 13), (5, 9), (336, 42)])
def test_the_corner_of_a_cell_is_the_pixel_of_torchs_nearest(side, cells):
    """The releases of SegSort and HSG bring region maps to the grid of cells with it."""
    maps = torch.arange(2 * side * side).view(2, side, side)
    expected = F.interpolate(maps[:, None].double(), size=(cells, cells), mode="nearest")[:, 0].long()
    assert torch.equal(segments.at_cells(maps, (cells, cells), "corner"), expected)


def test_cells_of_a_convolution_lie_around_corners_and_patches_around_centres():
    """Where a cell looks, measured: the gradient of one cell with respect to the picture is centred there."""
    convolutions = torch.nn.Sequential(*[torch.nn.Conv2d(1, 1, 3, stride=2, padding=1, bias=False) for _ in range(4)])
    patches = torch.nn.Conv2d(1, 1, 16, stride=16, bias=False)
    rows = torch.arange(224).view(1, 224, 1).expand(1, 224, 224)
    for network, pixel, middle in ((convolutions, "corner", 112.0), (patches, "centre", 119.5)):
        for weight in network.parameters():
            torch.nn.init.ones_(weight)
        picture = torch.zeros(1, 1, 224, 224, requires_grad=True)
        network(picture)[0, 0, 7, 7].backward()
        mass = picture.grad[0].sum(2).double() / picture.grad.sum()
        assert (mass * rows[:, :, 0]).sum() == pytest.approx(middle)
        assert abs(int(segments.at_cells(rows, (14, 14), pixel)[0, 7, 7]) - middle) <= 0.5
