"""`export`: the program of torch.export, used by the script of docs/your_pictures.md, against `predict`."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import run
from tests.conftest import run_small

pytestmark = pytest.mark.train
PAGE = Path(run.__file__).parent / "docs" / "your_pictures.md"
EACH = """
import runpy, sys
for name in sys.argv[1:]:
    which, picture = name.split("/")
    sys.argv = ["use.py", f"../{which}/segmenter.pt2", f"../in/{picture}.png", f"../{name}-ids.png"]
    runpy.run_path("use.py", run_name="__main__")
"""
"""The script for each program and picture, as a command of its own would run it; torch is imported once."""
SIZES = {"a": (61, 47), "b": (48, 48), "c": (200, 90)}
PROGRAMS = ("checkpoint", "convolutional", "many")


@pytest.fixture(scope="module")
def checkpoint(small_run) -> Path:
    return small_run("hidden_positives").folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def convolutional(tmp_path_factory) -> Path:
    """Of a network whose coarsest cells are 32 px."""
    words = ["backbone=mobilenetv2_coral", "backbone.weights=none", "data.train_size=64", "data.eval_size=64"]
    found = run_small("kmeans_baseline", tmp_path_factory.mktemp("cnn"), "c", *words, "trainer.max_steps=1")
    return found.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Of more clusters than 8 bits tell apart."""
    words = ["method.num_clusters=300", "trainer.max_steps=1"]
    found = run_small("kmeans_baseline", tmp_path_factory.mktemp("many"), "c", *words)
    return found.folder / "checkpoints" / "last.ckpt"


@pytest.fixture(scope="module")
def used(request, tmp_path_factory) -> Path:
    """A folder for each of PROGRAMS: the program, what `predict` wrote, and what the script of the page did."""
    script = next(code for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "torch.export" in code)
    assert len(script.strip().splitlines()) <= 20
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("used")
    (root / "in").mkdir()
    for name, size in SIZES.items():
        small = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(root / "in" / f"{name}.png")
    for which in PROGRAMS:
        checkpoint, folder = request.getfixturevalue(which), root / which
        folder.mkdir()
        assert run.main(["export", f"ckpt={checkpoint}", f"output={folder}/segmenter.pt2"]) == 0
        assert run.main(["predict", f"ckpt={checkpoint}", f"input={root}/in", f"output={folder}/out"]) == 0
    (root / "elsewhere").mkdir()
    (root / "elsewhere" / "use.py").write_text(script)
    command = [sys.executable, "-I", "-c", EACH, *(f"{which}/{name}" for which in PROGRAMS for name in SIZES)]
    done = subprocess.run(command, cwd=root / "elsewhere", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return root


@pytest.mark.timeout(900)  # all three exports stand before the first
@pytest.mark.parametrize("which", PROGRAMS)
def test_the_script_of_the_readme_gives_the_labels_of_predict(which, used):
    highest = []
    for name, size in SIZES.items():
        found = np.asarray(Image.open(used / which / f"{name}-ids.png"))
        expected = np.asarray(Image.open(used / which / "out" / "index" / f"{name}.png"))
        assert found.shape == expected.shape == size[::-1]
        assert (found == expected).mean() > 0.998, name
        highest.append(int(expected.max()))
    assert (max(highest) > 255) == (which == "many")


def test_the_range_is_kept_and_said(checkpoint, tmp_path, caplog):
    caplog.set_level("INFO")
    assert run.main(["export", f"ckpt={checkpoint}", f"output={tmp_path}/s.pt2", "predict.size=64"]) == 0
    assert "12 clusters of probe kmeans, sides from 32 to 2048 px in steps of 8" in caplog.text
    program = torch.export.load(tmp_path / "s.pt2").module()
    assert program(torch.rand(1, 3, 64, 128)).shape == (1, 12, 8, 16)
    with pytest.raises(Exception, match="8"):
        program(torch.rand(1, 3, 64, 60))


def test_a_program_of_a_method_that_finds_objects_says_what_is_no_part_of_it(small_run, tmp_path, caplog):
    last = small_run("cutler").folder / "checkpoints" / "last.ckpt"
    assert run.main(["export", f"ckpt={last}", f"output={tmp_path}/s.pt2"]) == 0
    assert f"{tmp_path}/s.pt2: objects one by one are no part of a program; `predict` writes them" in caplog.text
    program = torch.export.load(tmp_path / "s.pt2")
    assert program.module()(torch.rand(1, 3, 64, 128)).shape == (1, 12, 8, 16)
    assert not [name for name in program.state_dict if "detector" in name]  # of what it never reads nothing is kept
    assert [name for name in program.state_dict if "backbone" in name]
    assert "nothing says which classes are objects" not in caplog.text


def test_wrong_words_end_in_one_line(checkpoint, tmp_path, capsys):
    assert run.main(["export", f"ckpt={checkpoint}", f"output={tmp_path}/s.onnx"]) == 2
    line = f"error: output={tmp_path}/s.onnx: expected a file that ends in .pt2, which torch.export.load reads\n"
    assert capsys.readouterr().err.endswith(line)
    assert run.main(["export", f"ckpt={checkpoint}", f"output={tmp_path}/s.pt2", "evaluation.crf=dense"]) == 2
    line = "error: evaluation.crf=dense: is no part of a program; set evaluation.crf=none\n"
    assert capsys.readouterr().err.endswith(line)
