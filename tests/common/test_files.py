"""Files appear whole, or stay as they were."""

import pytest

from common.files import copy_whole, whole, write_text


def test_a_text_takes_the_place_of_the_old_one_as_it_is(tmp_path):
    path = tmp_path / "a.csv"
    write_text(path, "old")
    write_text(path, "one\r\ntwö\n")
    assert path.read_bytes() == "one\r\ntwö\n".encode()
    assert [item.name for item in tmp_path.iterdir()] == ["a.csv"]


def test_what_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")

    def half():
        with whole(path) as temporary:
            temporary.write_text("half of")
            assert path.read_text() == "old"
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        half()
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_failed_replace_removes_the_temporary_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    with pytest.raises(OSError):
        write_text(tmp_path / "folder", "text")
    assert [item.name for item in tmp_path.iterdir()] == ["folder"]


def test_copies_appear_whole(tmp_path):
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    copy_whole(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2
