"""Rooms: which may import which (pyproject.toml has the order, import-linter holds it), and how large they grow."""

import ast
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import run

ROOT = Path(run.__file__).parent
ROOMS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["root_packages"]
LINT = "from importlinter.cli import lint_imports_command as lint; lint()"
LISTS_OF_METHODS = {"lightning_modules", "tests/reference", "tests/lightning_modules", "docs/methods"}


def sources() -> list[Path]:
    found = [
        path for path in ROOT.glob("*/**/*.py") if path.relative_to(ROOT).parts[0] in (*ROOMS, "tests", "benchmarks")
    ]
    return [*found, ROOT / "run.py", ROOT / "config.py"]


def imported(path: Path) -> set[str]:
    """Top-level names that a file imports."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    given = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in plain | given}


@pytest.fixture
def tree(tmp_path):
    """A copy of the source, to be spoilt."""
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("file", "line", "said"),
    [
        ("common/errors.py", "import launch.words", "common is not allowed to import launch"),
        ("evaluation/crf.py", "from reporting import panels", "evaluation is not allowed to import reporting"),
        ("lightning_modules/base/optim.py", "from lightning_modules import stego", "allowed in lightning_modules"),
        ("common/spec.py", "import common.names", None),
        ("grouping/masks.py", "import faiss", "grouping.masks -> faiss"),
        ("inference/naming.py", "import timm", "inference.naming -> timm"),
        ("common/errors.py", "import common.ending", "No cycles are allowed in common"),
    ],
)  # fmt: skip
def test_a_broken_contract_is_named(tree, file, line, said):
    path = tree / file
    path.write_text(f"{line}\n{path.read_text()}")
    done = subprocess.run(
        [sys.executable, "-c", LINT, "--no-logo", "--no-cache"], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == (0 if said is None else 1), done.stdout
    if said is not None:
        assert said in done.stdout


def test_every_room_is_under_the_contracts():
    """A new folder with Python in it belongs into the order of pyproject.toml."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks", "docs"}
    assert folders == set(ROOMS)


def test_the_two_files_beside_the_rooms_know_their_place():
    """import-linter sees folders alone. config.py knows common; nothing but tests imports run.py."""
    assert imported(ROOT / "config.py") & {*ROOMS, "run"} == {"common"}
    for path in sources():
        if path.relative_to(ROOT).parts[0] in ROOMS:
            assert "run" not in imported(path), path
            if path.relative_to(ROOT).parts[0] == "common":
                assert "config" not in imported(path), path


def test_files_and_folders_stay_readable():
    long = {str(path.relative_to(ROOT)): n for path in sources() if (n := len(path.read_text().splitlines())) > 500}
    assert not long
    files = Counter(path.relative_to(ROOT).parent.as_posix() for path in sources())
    assert not {folder: n for folder, n in files.items() if n > 18 and folder not in LISTS_OF_METHODS}
