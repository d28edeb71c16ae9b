"""Both sides of the pieces of CAUSE and ACSeg give the same answer."""

import pytest

from benchmarks import modularity

PIECES = {piece.name: piece for piece in modularity.pieces(quick=True)}


@pytest.mark.parametrize("name", PIECES)
def test_the_plain_formulation_gives_the_same_answer(name):
    piece = PIECES[name]
    plain, ours = (getattr(modularity, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=1e-5)


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    assert [piece.faster for piece in modularity.pieces(quick=False)] == [5.0, 1.0, 1.0]
    assert all(piece.faster is None and piece.smaller is None for piece in PIECES.values())
