"""Names that people give to files and classes, of which none may harm a terminal, a page, a picture or another file."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import config
from common import chance, names
from common.errors import ConfigError
from common.names import of_results, shown
from common.spec import ClassMeta
from datamodules.files import reading
from evaluation.matching import score
from reporting import page as pages
from reporting import panels, report
from tests.datamodules.pictures import noise

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("été 日本 \U0001f600", "été 日本 \U0001f600"),
        ("a\r\n\tb", r"a\r\n\tb"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("caf\udce9", r"caf\xe9"),
        ("\x9b2J\u202eexe\u2028", r"\x9b2J\u202eexe\u2028"),
        ("\ud800", r"\ud800"),
    ],
)
def test_what_cannot_be_shown_is_escaped(text, expected):
    assert shown(text) == expected
    assert shown(shown(text)) == expected
    shown(text).encode("utf-8")


def test_names_of_results_are_unique_whatever_endings_are_mixed():
    files = ["a.jpg", "a.png", "a.jpg.png", "b.jpg", "c/b.png", "d.tif"]
    assert of_results(files) == ["a.jpg", "a.png", "a.jpg.png", "b", "c/b", "d"]


def test_names_of_results_leave_room_for_folders_of_pictures():
    """The map of x.jpg would be x.png, which is a folder of other maps."""
    assert of_results(["x.jpg", "x.png/y.jpg", "z.jpg", "z/y.jpg"]) == ["x.jpg", "x.png/y", "z", "z/y"]
    assert of_results(["x.jpg", "x.png/y.jpg", "x.jpg.png/y.jpg"]) == ["x.jpg~2", "x.png/y", "x.jpg.png/y"]


def test_names_of_results_are_safe_and_short():
    files = [
        "caf\udce9.png",
        "caf\\xe9.png",
        "n\n.png",
        "x" * 250 + ".jpg",
        "x" * 250 + ".png",
        "\udce9" * 200 + ".png",
    ]
    found = of_results(files)
    assert found[:3] == [r"caf\xe9.png", r"caf\xe9.png~2", r"n\n"]
    assert len(set(found)) == len(files)
    assert all(len(name.encode()) <= 240 for name in found)


def test_keyed_chance_takes_any_name_and_old_draws_stay():
    assert chance.key(0, "folder.held_out/été") == chance.key(0, "folder.held_out/été")
    assert chance.key(0, "caf\udce9") != chance.key(0, "caf\udcea")
    assert chance.key(3, "a", 1) == 6013746078666741066


def test_lines_of_a_log_are_harmless(capsys):
    record = logging.LogRecord("x", logging.INFO, "", 0, "%s\nsecond\tline", ("\x1b[2J\udce9",), None)
    assert names.Lines("%(message)s").format(record) == "\\x1b[2J\\xe9\nsecond\tline"


def test_classes_with_control_characters(tmp_path):
    path = tmp_path / "classes.json"
    path.write_text(json.dumps(["sky\r", " road\r\n"]))
    assert reading.read_classes(path) == ("sky", "road")
    for bad in ("a\x1b[31m", "a\nb", "\ud800", " "):
        path.write_text(json.dumps(["sky", bad]))
        with pytest.raises(reading.DataError, match=r"name 1 is .*; a name must hold"):
            reading.read_classes(path)


def test_pictures_and_tables_of_any_name_are_drawn(tmp_path):
    """Pillow's text engine ends at a carriage return, matplotlib at half a formula, rich at a closing tag."""
    meta = ClassMeta(("a\rb", "$\\frac", "[/red]", "c\nd"))
    assert meta.names == ("a\\rb", "$\\frac", "[/red]", "c\\nd")
    ids = np.arange(4).reshape(2, 2)
    panels.save(tmp_path / "a.png", [panels.Row(noise(), {"x": ids}, ids, "t\r\n", ((None, "\r"),))], meta)
    panels.legend_png(tmp_path / "b.png", ["a\rb\x1b"], [(1, 2, 3)])
    scores = score(np.eye(4, dtype=np.int64) * 5, "hungarian")
    panels.confusion(tmp_path / "c.png", scores, meta)
    assert "[/red]" in report.as_text(report.per_class_table({"cluster": scores}, meta))


def test_pages_hold_no_control_characters():
    text = pages.ENVIRONMENT.from_string("{{ name }}").render(name="<\x1b\udce9\n>")
    assert text == "&lt;\\x1b\\xe9\n&gt;"


def test_settings_that_are_no_utf_8_end_in_one_line():
    with pytest.raises(ConfigError) as caught:
        config.compose(["data=folder", "data.root=/pics/caf\udce9"])
    assert str(caught.value) == (
        "data.root=/pics/caf\\xe9: is no UTF-8, which the settings of a run are written in; rename it, or name a link "
        "to it"
    )


def test_json_and_texts_of_any_name_can_be_written(tmp_path):
    report.write_json(tmp_path / "a.json", {"caf\udce9": ["caf\udce9"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"caf\\xe9": ["caf\\xe9"]}


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_closed_pipe_ends_quietly(unbuffered):
    read, write = os.pipe()
    os.close(read)
    assert helped(write, unbuffered) == (0, "")
    os.close(write)


def test_a_full_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        code, said = helped(full.fileno(), "")
    assert code == 2
    assert said == "error: standard output cannot be written (No space left on device); make room\n"


def helped(output: int, unbuffered: str) -> tuple[int, str]:
    """Exit code and standard error of a command whose standard output nobody reads."""
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        [sys.executable, "run.py", "help"], cwd=ROOT, stdout=output, stderr=subprocess.PIPE, text=True, env=environment
    )
    return done.returncode, done.stderr
