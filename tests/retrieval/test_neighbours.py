"""The table of near pictures: exact, without the item itself, whole on disk, the same from any split over ranks."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from retrieval import neighbours


def unit(seed: int, rows: int, dim: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_pictures_are_unit_means_without_gradient():
    maps = torch.randn(3, 4, 2, 5, requires_grad=True)
    found = neighbours.pooled(maps)
    torch.testing.assert_close(found, F.normalize(maps.detach().mean((2, 3)), dim=1))
    assert not found.requires_grad


def test_blocks_change_nothing(monkeypatch):
    rows = unit(0, 50)
    whole = neighbours.nearest_pictures(rows, 7)
    monkeypatch.setattr(neighbours, "BLOCK_ROWS", 8)
    parts = neighbours.nearest_pictures(rows, 7)
    assert torch.equal(parts[1], whole[1])
    assert torch.equal(whole[1][:, 0], torch.arange(50))
    torch.testing.assert_close(whole[0], (rows @ rows.T).topk(7).values)


def test_others_leave_the_item_out_even_among_copies():
    rows = unit(1, 20)
    rows[3] = rows[11] = rows[0]  # copies: faiss may name any of them first
    found = neighbours.near_others(rows, torch.arange(20), 5, slice(0, 20))
    scores = rows @ rows.T
    scores.fill_diagonal_(-2)
    torch.testing.assert_close((rows @ rows.T).gather(1, found), scores.topk(5).values)
    assert (found != torch.arange(20)[:, None]).all()
    assert set(found[0, :2].tolist()) == {3, 11}


def test_crops_of_one_picture_are_left_out_together():
    rows = unit(2, 15)
    rows[5:10] = F.normalize(rows[5] + 0.01 * unit(3, 5), dim=1)  # five crops of picture 1 are nearest to each other
    alone = neighbours.table(rows, torch.arange(15), 15, 4)
    apart = neighbours.table(rows, torch.arange(15), 15, 4, per_picture=5)
    assert (alone[5:10] // 5 == 1).all()
    assert (apart // 5 != torch.arange(15)[:, None] // 5).all()
    scores = (rows @ rows.T).masked_fill(torch.arange(15)[:, None] // 5 == torch.arange(15) // 5, -2)
    assert torch.equal(apart, scores.topk(4).indices)


def test_small_sets_repeat_and_a_single_picture_names_itself():
    rows = unit(4, 3)
    found = neighbours.table(rows, torch.arange(3), 3, 5)
    order = [other for other in (rows @ rows.T)[0].argsort(descending=True).tolist() if other != 0]
    assert found[0].tolist() == [*order, *order, order[0]]
    assert neighbours.table(rows[:1], torch.arange(1), 1, 2).tolist() == [[0, 0]]


def test_items_without_a_vector_are_named_by_no_other():
    items = torch.tensor([0, 1, 3, 4, 6])
    found = neighbours.table(unit(5, 5), items, 7, 2)
    for missing in (2, 5):
        assert found[missing].tolist() == [missing, missing]
        assert missing not in found[items]
    assert (found[items] != items[:, None]).all()


def test_a_table_is_made_once_and_read_after_that(tmp_path, caplog):
    made = []

    def make():
        made.append(1)
        return torch.tensor([[1, 2], [0, 2], [1, 0]])

    name = neighbours.fingerprint(backbone="x", stored=2)
    with caplog.at_level(logging.INFO):
        first = neighbours.cached(tmp_path / "deep", name, make)
    path = tmp_path / "deep" / f"{name}.npz"
    assert caplog.messages == [f"table of neighbours: 3 x 2, kept in {path}"]
    second = neighbours.cached(tmp_path / "deep", name, make)
    assert len(made) == 1
    assert torch.equal(first, second)
    assert second.dtype == torch.int64
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert neighbours.fingerprint(backbone="y", stored=2) != name


@pytest.mark.parametrize("harm", ["cut", "foreign", "other"])
def test_a_cut_or_foreign_file_is_made_anew(harm, tmp_path, caplog):
    path = tmp_path / "a.npz"
    table = torch.tensor([[1], [0]])
    neighbours.cached(tmp_path, "a", lambda: table * 0)
    if harm == "cut":
        path.write_bytes(path.read_bytes()[:100])
    elif harm == "foreign":
        path.write_text("no archive")
    else:
        np.savez(path, neighbours=np.zeros((2, 1)), fingerprint=np.array("b"))
    assert torch.equal(neighbours.cached(tmp_path, "a", lambda: table), table)
    assert torch.equal(neighbours.cached(tmp_path, "a", lambda: table * 0), table)
    assert any("cannot be read" in message for message in caplog.messages) is (harm != "other")


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    table = torch.tensor([[1], [0]])
    assert torch.equal(neighbours.cached(tmp_path / "file", "a", lambda: table), table)
    assert caplog.messages == [f"cache.dir={tmp_path / 'file'}: the table of neighbours cannot be kept (File exists)"]
