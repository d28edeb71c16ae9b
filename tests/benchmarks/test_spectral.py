"""Both sides of the pieces of the graph cuts give the same answer."""

import pytest

from benchmarks import spectral

PIECES = {piece.name: piece for piece in spectral.pieces(quick=True)}


@pytest.mark.parametrize("name", PIECES)
def test_the_plain_formulation_gives_the_same_answer(name):
    piece = PIECES[name]
    plain, ours = (getattr(spectral, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=1e-5)


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    assert [(piece.faster, piece.smaller) for piece in spectral.pieces(quick=False)] == [
        (15.0, None),
        (20.0, None),
        (4.0, None),
        (4.0, None),
    ]
    assert all(piece.faster is None for piece in PIECES.values())
