"""Both sides of the pieces of the segment family give the same answer."""

import pytest

from benchmarks import segments

PIECES = {piece.name: piece for piece in segments.pieces(quick=True)}


@pytest.mark.parametrize("name", [name for name in PIECES if not name.startswith("large")])
def test_the_plain_formulation_gives_the_same_answer(name):
    piece = PIECES[name]
    plain, ours = (getattr(segments, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=2e-3 if "loss" in name else 1e-12)


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    asked = [(piece.faster, piece.smaller) for piece in segments.pieces(quick=False)]
    assert asked == [(1.0, None), (1.0, None), (1 / 0.75, 15.0), (None, None)]
    assert all(piece.faster is None and piece.smaller is None for piece in PIECES.values())
