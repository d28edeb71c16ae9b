"""What counts as a picture below a folder."""

import logging
import os

import pytest

from common.errors import ConfigError
from common.files import make_output
from datamodules.files.reading import is_picture
from datamodules.files.walking import expect_apart, files_below, reads, walk
from datamodules.folder import pictures_below
from tests.datamodules.pictures import noise, save


def touched(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def test_leftovers_of_other_programs_are_no_pictures(tmp_path):
    touched(
        tmp_path, "a.png", "b/c.JPG", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/a.png", "__MACOSX/._a.png",
        "b/@eaDir/x.png", "$RECYCLE.BIN/x.png", "#recycle/x.png", "Thumbs.db", "lost+found/x.png", "._a.png",
        ".hidden.png", "desktop.ini", "b/.@__thumb/c.JPG",
    )  # fmt: skip
    found = walk(tmp_path, is_picture)
    assert found.names == ["a.png", "b/c.JPG"]
    assert found.left_out == ""


def test_other_endings_are_counted_in_one_line(tmp_path, caplog):
    save(tmp_path / "a.png", noise())
    touched(tmp_path, "b.heic", "c/d.HEIC", "e.txt", "README", "v.mp4", "x.1", "x.2", "x.3", "x.4", ".e.heic")
    with caplog.at_level(logging.INFO, "datamodules"):
        assert len(pictures_below(tmp_path)) == 1
    [line] = [record.getMessage() for record in caplog.records]
    assert line.startswith(f"{tmp_path}: 1 pictures; files of other kinds are left out: 2 .heic, 1 ")
    assert line.endswith(" and 2 other endings")


def test_plain_files_alone(tmp_path, caplog):
    touched(tmp_path, "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").symlink_to("/dev/zero")
    touched(tmp_path, "d.png/e.png")
    (tmp_path / "f.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "g.png").symlink_to(tmp_path / "g.png")
    assert files_below(tmp_path, is_picture) == ["a.png", "d.png/e.png", "f.png", "g.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/{name}: is no plain file (a pipe, a socket or a device); skipped" for name in ("b.png", "c.png")
    ]


def test_links_that_lead_back_are_followed_once(tmp_path):
    touched(tmp_path, "a/x.png", "b/y.png")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b" / "a").symlink_to(tmp_path / "a")
    assert len(files_below(tmp_path, is_picture)) == 2


def test_output_of_this_project_is_no_picture(tmp_path, caplog):
    touched(tmp_path, "a.png", "m/panels/sheet.png", "other/b.png", "p/clusters/a.png")
    groups = "".join(f"{name}:\n  x: 1\n" for name in ("method", "data", "backbone", "trainer", "evaluation"))
    (tmp_path / "m" / "config.yaml").write_text(groups)
    (tmp_path / "other" / "config.yaml").write_text("data: {x: 1}\n")
    make_output(tmp_path / "p")
    assert files_below(tmp_path, is_picture) == ["a.png", "other/b.png"]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/{name}: holds output of this project and is not read as pictures" for name in ("m", "p")
    ]
    assert files_below(tmp_path / "m" / "panels", is_picture) == ["sheet.png"]
    assert files_below(tmp_path / "p", is_picture) == ["clusters/a.png"]


@pytest.mark.parametrize(
    ("target", "inside"), [("", True), ("a/b", True), (".cache/a", False), ("../x", False), ("@eaDir", False)]
)
def test_where_output_would_be_read(tmp_path, target, inside):
    assert reads(tmp_path, tmp_path / target) is inside
    if inside:
        with pytest.raises(ConfigError, match=f"^run.dir={tmp_path / target}: lies in data.root={tmp_path} and would"):
            expect_apart([("data.root", tmp_path)], "run.dir", tmp_path / target)
