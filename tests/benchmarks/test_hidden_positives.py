"""Both sides of every piece compute the same thing, and the table of a run in processes of their own is complete."""

import math

import pytest
import torch

from benchmarks import harness, hidden_positives
from losses.contrastive import pairs

PIECES = {piece.ours: piece for piece in hidden_positives.pieces(128, quick=True)}


@pytest.mark.parametrize("name", ["contrastive_ours", "mixing_ours"])
def test_the_plain_formulation_gives_the_same_answer(name):
    piece = PIECES[name]
    plain, ours = (getattr(hidden_positives, side)(**piece.settings)() for side in (piece.plain, piece.ours))
    assert plain != 0
    assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", ["contrastive_ours", "mixing_ours"])
def test_the_plain_formulation_gives_the_same_gradients(name, monkeypatch):
    piece, inputs = PIECES[name], PIECES[name].ours.replace("ours", "inputs")
    make, made = getattr(hidden_positives, inputs), []
    monkeypatch.setattr(
        hidden_positives, inputs, lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1]
    )
    for side in (piece.plain, piece.ours):
        getattr(hidden_positives, side)(**piece.settings)()
    plain, ours = ((case["z"], case["z_mix"]) if isinstance(case, dict) else case[:1] for case in made)
    for one, other in zip(plain, ours, strict=True):
        assert one.grad.abs().sum() > 0
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-4, atol=1e-6)


def test_all_ways_of_the_loss_are_measured_in_turns(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(
        hidden_positives.harness, "_in_child", lambda piece, made, *_: calls.append(made) or harness.Side(1.0, 7.0, 0.0)
    )
    assert hidden_positives.main(["--quick", "--ways", "--repeats", "1", "--threads", "1"]) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == list(hidden_positives.WAYS)
    assert calls == list(hidden_positives.WAYS.values())
    assert all(float(row[1]) > 0 and row[2] == "7" and float(row[4]) < 1e-5 for row in rows)


def test_the_sieve_is_left_out_where_float32_is_measured(monkeypatch):
    sieved = []
    monkeypatch.setattr(pairs, "native_half", lambda device: True)
    rounded = pairs._rounded
    monkeypatch.setattr(pairs, "_rounded", lambda *kind: sieved.append(1) or rounded(*kind))
    sizes = PIECES["contrastive_ours"].settings
    hidden_positives.contrastive_float32(**sizes)()
    assert not sieved
    hidden_positives.contrastive_sparse(**sizes)()
    assert len(sieved) == 2


def test_full_sizes_carry_the_targets_and_quick_ones_do_not():
    targets = [(piece.faster, piece.smaller) for piece in hidden_positives.pieces(12_544, quick=False)]
    assert targets == [(1 / 0.65, 10.0), (100.0, 10.0), (1000.0, None)]
    assert all(piece.faster is None and piece.smaller is None for piece in PIECES.values())


@pytest.mark.slow
def test_a_quick_run_prints_a_line_for_each_piece(capsys):
    assert hidden_positives.main(["--quick", "--repeats", "1", "--threads", "1"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 2 + 2 + len(PIECES)
    assert "no GPU" in lines[0] or torch.cuda.is_available()
    for piece, line in zip(PIECES.values(), lines[-len(PIECES) :], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0].startswith(piece.name)
        assert float(cells[3]) > 0


def test_ratios_targets_and_differences_of_a_row():
    piece = harness.Piece("x", "m", "a", "b", faster=4.0, smaller=2.0)
    row = harness.Row(piece, harness.Side(10.0, 100.0, 2.0), harness.Side(2.0, 20.0, 2.1))
    assert (row.faster, row.smaller, row.met) == (5.0, 5.0, True)
    assert row.asked == "4 x time, 2 x memory: met"
    assert row.difference == "5.0e-02"
    slow = harness.Row(piece, row.plain, harness.Side(5.0, 20.0, math.nan))
    assert slow.asked == "4 x time, 2 x memory: MISSED"
    assert slow.difference == "-"
    assert harness.table([row, slow]).splitlines()[2] == (
        "| x | 10, 100 | 2, 20 | 5 | 5 | 4 x time, 2 x memory: met | 5.0e-02 |"
    )


def test_memory_is_the_growth_above_the_set_up():
    # In a process of its own: memory that other tests have freed would be taken again, and nothing would grow.
    side = harness._in_child(harness.Piece("x", __name__, "-", "-"), "hold_forty_mib", 1, 1, "default")
    assert 35 < side.mib < 80
    assert side.answer == 1.0
    assert side.seconds > 0


def test_extrapolated_work_counts_its_factor():
    plain, scaled = (harness._measure(__name__, "sleeping", {"factor": factor}, 9).seconds for factor in (1, 100))
    assert 20 < scaled / plain < 500


def hold_forty_mib():
    before = torch.ones(10 << 20)  # of the set-up: not counted

    def work():
        return float(torch.ones(10 << 20).mean() * before[0])

    return work


def sleeping(factor):
    def work():
        torch.ones(1 << 16).sort()
        return 0.0

    return harness.extrapolated(work, factor)


def test_a_side_that_fails_is_reported_with_its_error():
    piece = harness.Piece("broken", "benchmarks.harness", "missing_function", "mixing_ours")
    with pytest.raises(RuntimeError, match=r"(?s)^broken: missing_function ended with code 1\n.*AttributeError"):
        harness.compare(piece, threads=1, repeats=1)
