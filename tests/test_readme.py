"""The walk-throughs of the README, followed word for word in a copy of the tree."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import run as entry

ROOT = Path(entry.__file__).parent
FILES = {
    "class ColourBlind": "lightning_modules/colour_blind.py",
    "name: colour_blind": "configs/method/colour_blind.yaml",
    "class StripesDataModule": "datamodules/stripes.py",
}


def blocks() -> list[str]:
    return re.findall(r"```(?:python|yaml)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)


def test_the_readme_holds_the_walk_throughs():
    for mark in FILES:
        assert sum(mark in block for block in blocks()) == 1, mark


def test_targets_of_the_readme_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"`?make ([a-z-]+)", (ROOT / "README.md").read_text()):
        assert target in targets | {"it"}, target


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_method_and_a_data_set_from_the_readme_train(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "__pycache__"))
    for mark, name in FILES.items():
        (copy / name).write_text(next(block for block in blocks() if mark in block))
    stripes = (copy / "configs" / "data" / "folder.yaml").read_text().replace("name: folder", "name: stripes")
    (copy / "configs" / "data" / "stripes.yaml").write_text(stripes)
    words = ["method=colour_blind", "data=stripes", "data.train_size=96", "data.eval_size=96", "data.batch_size=8"]
    words += ["trainer.max_steps=30", "run.dir=runs", "run.name=x"]
    code = "import sys; sys.path.insert(0, '.'); import run; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", *words]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (copy / "runs" / "x" / "metrics.json").is_file()
