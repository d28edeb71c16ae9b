"""Concept maps from one batched product are those of one backward pass a concept."""

import pytest

from benchmarks import concepts


def test_the_plain_formulation_gives_the_same_answer():
    (piece,) = concepts.pieces(quick=True)
    plain, ours = (getattr(concepts, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain > 0
    assert ours == pytest.approx(plain, rel=1e-5)


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    assert [(piece.faster, piece.smaller) for piece in concepts.pieces(quick=False)] == [(50.0, 10.0)]
    assert all(piece.faster is None for piece in concepts.pieces(quick=True))
