"""Both sides of IIC's loss give the same answer."""

import pytest

from benchmarks.scratch import information


def test_the_convolution_gives_the_same_answer():
    (piece,) = information.pieces(quick=True)
    plain, ours = (getattr(information, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=1e-5)
    assert piece.faster is None
    assert [full.faster for full in information.pieces(quick=False)] == [7.0]
