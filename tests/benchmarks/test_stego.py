"""Both sides of the pieces of STEGO and of the evaluation give the same answer."""

import pytest

from benchmarks import evaluation, stego

PIECES = {
    f"{module.__name__}.{piece.name}": (module, piece)
    for module in (stego, evaluation)
    for piece in module.pieces(quick=True)
}


@pytest.mark.parametrize("name", [name for name in PIECES if "table" not in name and "bf16" not in name])
def test_the_plain_formulation_gives_the_same_answer(name):
    module, piece = PIECES[name]
    plain, ours = (getattr(module, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=2e-3 if "kept" in name else 1e-5)  # kept features are of half precision


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    assert [piece.faster for piece in stego.pieces(quick=False)] == [1.25, 3.0, None, None]
    assert [(piece.faster, piece.smaller) for piece in evaluation.pieces(quick=False)] == [(20.0, 20.0), (None, None)]
    assert all(piece.faster is None and piece.smaller is None for _, piece in PIECES.values())


def test_a_word_that_no_piece_has_is_refused(capsys):
    for module in (stego, evaluation):
        with pytest.raises(SystemExit):
            module.main(["--only", "nothing"])
        assert "no piece has this word" in capsys.readouterr().err
