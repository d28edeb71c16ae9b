"""What run.py says to words: exit codes and one-line errors."""

import pytest

import run


def call(capsys: pytest.CaptureFixture, *words: str) -> tuple[int, str, str]:
    code = run.main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def error_line(capsys: pytest.CaptureFixture, *words: str) -> str:
    code, _, err = call(capsys, *words)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]
