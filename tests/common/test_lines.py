"""Lines about paths and names say what is so."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from common import files
from common.errors import CheckpointError, DataError, did_you_mean
from datamodules.base import regions
from lightning_modules.stego import Stego
from reporting import comparison, comparison_tables
from tests.reporting.test_comparison import three


def test_a_folder_where_a_file_is_wanted_and_the_reverse(tmp_path):
    with pytest.raises(CheckpointError) as caught:
        files.expect_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"ckpt={tmp_path}: is a folder, and a file is wanted; a run keeps its own under checkpoints/last.ckpt and "
        "best.ckpt"
    )
    path = tmp_path / "a"
    path.touch()
    assert (files.no_folder(path), files.no_folder(tmp_path / "b")) == (
        "is a file, and a folder is wanted", "there is no such folder",
    )  # fmt: skip
    assert files.no_file(tmp_path / "b") == "no such file"


def test_a_checkpoint_without_read_rights_is_not_called_broken(tmp_path, monkeypatch):
    path = tmp_path / "a.ckpt"
    path.touch()
    monkeypatch.setattr(os, "access", lambda name, mode: False)
    with pytest.raises(CheckpointError) as caught:
        files.expect_checkpoint(path)
    assert str(caught.value) == f"ckpt={path}: may not be read by you; change its rights, or name a copy"


def test_masks_of_salience_are_named_by_their_own_key(tmp_path):
    assert Stego.region_key == "method.salience.root"
    with pytest.raises(DataError) as caught:
        regions.given(SimpleNamespace(), tmp_path / "x", Stego.region_key)
    assert str(caught.value) == f"method.salience.root={tmp_path}/x: there is no such folder"


def test_many_names_are_printed_by_a_command():
    known = [f"group.key{number:03d}.{number}" for number in range(40)]
    assert did_you_mean("zzz", known, "run.py show-config") == ("40 names are known, `run.py show-config` prints them")


def test_a_table_to_paste_holds_no_html_of_other_people():
    evil = '<img src=x onerror="alert(1)">![a](http://x/y.png)\x1b[2J\n# b'
    evils = [replace(run, title=evil) for run in three(method=evil, **{"protocol/matching": evil})]
    sections = comparison.arrange(evils)
    text = comparison_tables.markdown(sections, evil)
    assert "<" not in text
    assert "![" not in text
    assert "\x1b" not in text
    assert "\n# b" not in text
    assert "&lt;img src=x" in text
