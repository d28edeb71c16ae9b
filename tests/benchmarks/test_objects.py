"""Both sides of the pieces of EAGLE and MaskContrast give the same answer."""

import pytest

from benchmarks import objects

PIECES = {piece.name: piece for piece in objects.pieces(quick=True)}


@pytest.mark.parametrize("name", PIECES)
def test_the_plain_formulation_gives_the_same_answer(name):
    piece = PIECES[name]
    plain, ours = (getattr(objects, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=1e-4)


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    targets = [(piece.faster, piece.smaller) for piece in objects.pieces(quick=False)]
    assert targets == [(4, None), (None, 3), (None, 2), (1, 5)]
    assert all(piece.faster is None and piece.smaller is None for piece in PIECES.values())
