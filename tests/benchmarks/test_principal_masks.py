"""Both sides of the pieces of principal masks give the same answer."""

import pytest

from benchmarks import principal_masks

PIECES = {piece.name: piece for piece in principal_masks.pieces(quick=True)}


@pytest.mark.parametrize("name", PIECES)
def test_the_released_way_gives_the_same_answer(name):
    piece = PIECES[name]
    plain, ours = (getattr(principal_masks, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain > 0
    assert ours == pytest.approx(plain, rel=1e-4)


def test_full_sizes_carry_the_target_and_quick_ones_do_not():
    assert [piece.faster for piece in principal_masks.pieces(quick=False)] == [4.0, 4.0]
    assert all(piece.faster is None for piece in PIECES.values())
