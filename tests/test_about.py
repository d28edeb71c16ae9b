"""Name, version and licence: in one place, and in what is packed and written."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from setuptools import find_namespace_packages

import run
from common import about

ROOT = Path(run.__file__).parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_version_is_a_word(capsys):
    assert run.main(["version"]) == 0
    assert capsys.readouterr().out == f"Labelfree {PROJECT['project']['version']} (MIT licence)\n"
    assert run.main(["version", "x=1"]) == 2


def test_citation_and_licence_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (about.version(), about.LICENCE)
    assert PROJECT["project"]["license"] == about.LICENCE
    assert (ROOT / "LICENSE").read_text().startswith("MIT License\n\nCopyright (c) 2026 The Labelfree authors\n")


def test_a_module_is_found_beside_its_room_in_a_folder_of_its_own_or_in_a_shared_one(tmp_path, monkeypatch):
    monkeypatch.setattr(about, "ROOT", tmp_path)
    for file in ("room/plain.py", "room/own/module.py", "room/kind/shared.py", "room/kind/plain.py"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    found = [about.module_of("room", name) for name in ("plain", "own", "shared", "absent")]
    assert found == ["room.plain", "room.own.module", "room.kind.shared", "room.absent"]


def tracked() -> list[str]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no checkout")
    return done.stdout.splitlines()


def packed() -> set[str]:
    """Folders that setuptools finds."""
    found = find_namespace_packages(str(ROOT), **PROJECT["tool"]["setuptools"]["packages"]["find"])
    return {name.split(".")[0] for name in found}


def test_every_room_is_packed():
    rooms = {name.split("/")[0] for name in tracked() if name.count("/") == 1 and name.endswith("/__init__.py")}
    assert rooms - {"tests", "benchmarks", "docs"} <= packed()


@pytest.mark.slow
def test_the_wheel_holds_what_a_run_reads(tmp_path):
    """Built without a network from a copy of the tree; every file that is no test, page or benchmark is in it."""
    pytest.importorskip("setuptools", minversion="77")
    names = [name for name in tracked() if (ROOT / name).is_file()]
    for name in names:
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "tree" / name)
    command = [sys.executable, "-c", "from setuptools.build_meta import build_wheel as b; print(b('..'))"]
    subprocess.run(command, cwd=tmp_path / "tree", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {name for name in names if name.split("/")[0] in packed()} | {"run.py", "config.py"}
    assert wanted <= inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not any(name.startswith(("tests/", "docs/", "benchmarks/")) for name in inside)
    metadata = next(name for name in inside if name.endswith("METADATA"))
    assert "License-Expression: MIT" in zipfile.ZipFile(wheel).read(metadata).decode()
