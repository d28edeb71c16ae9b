"""One patch of each cell, of maps of any shape."""

import torch

from losses.grid_sampling import cells, grid_places, sampled


def test_every_cell_gives_one_patch_and_the_rest_of_the_map_none():
    height, width, side = 5, 7, 2
    rows, columns = cells(height, width, side)
    assert (rows, columns) == (2, 3)
    order = torch.randint(side * side, (200, rows * columns), generator=torch.Generator().manual_seed(0))
    places = grid_places(order, height, width, side)
    row, column = places // width, places % width
    assert torch.equal(row // side, (torch.arange(6) // columns).expand(200, -1))
    assert torch.equal(column // side, (torch.arange(6) % columns).expand(200, -1))
    assert torch.equal(order, row % side * side + column % side)
    assert len(places.unique()) == 24  # all patches of all whole cells, and no other


def test_vectors_are_those_of_the_map():
    maps = torch.arange(2 * 3 * 4 * 4.0).view(2, 3, 4, 4)
    places = grid_places(torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]), 4, 4, 2)
    found = sampled(maps, places)
    assert found.shape == (2, 4, 3)
    for picture in range(2):
        for number, place in enumerate(places[picture].tolist()):
            assert torch.equal(found[picture, number], maps[picture, :, place // 4, place % 4])
