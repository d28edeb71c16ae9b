"""The walk-throughs of the README and of docs/, followed word for word in a copy of the tree."""

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import run as entry
from tests.conftest import small_words
from tests.datamodules.pictures import save
from tests.support.pages import PAGES, ROOT, blocks

FILES = {
    "class ColourBlind": "lightning_modules/colour_blind.py",
    "name: colour_blind": "configs/method/colour_blind.yaml",
    "class PatchBank": "lightning_modules/patch_bank.py",
    "name: patch_bank": "configs/method/patch_bank.yaml",
    "class StripesDataModule": "datamodules/stripes.py",
    "class GardenDataModule": "datamodules/garden.py",
    "name: garden": "configs/data/garden.yaml",
    "class HarbourDataModule": "datamodules/harbour.py",
}


def test_the_pages_hold_the_walk_throughs():
    for mark in FILES:
        assert sum(mark in block for block in blocks("python|yaml")) == 1, mark


def test_targets_of_the_pages_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        for target in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", page.read_text(), re.M):
            assert set(target) <= targets | {""}, (page, target)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def commands_of(section: str) -> list[str]:
    """The lines that begin with make in the first block of a section."""
    text = (ROOT / "README.md").read_text().split(f"## {section}\n")[1]
    return [line for line in text.split("```")[1].splitlines() if line.startswith("make ")]


@pytest.mark.train
@pytest.mark.timeout(600)
def test_own_pictures_become_named_segments(tmp_path, monkeypatch):
    """What make would run for each line of the README, with a small training; a name is edited in between."""
    rng = np.random.default_rng(0)
    for i in range(12):
        picture = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize((64, 48))
        (tmp_path / "my" / "pictures").mkdir(parents=True, exist_ok=True)
        picture.save(tmp_path / "my" / "pictures" / f"{i}.jpg")
    lines = commands_of("Your own pictures")
    assert [line.split()[1] for line in lines] == ["train", "clusters", "predict"]
    small = [word for word in small_words("hidden_positives", "data=folder") if not word.startswith("backbone=")]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line.replace("/my/", f"{tmp_path}/my/"))
        make = ["make", "--no-print-directory", "-n", "-f", str(ROOT / "Makefile"), "PY=python", *words[1:]]
        shown = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        _, program, *asked = shlex.split(shown)
        assert program == "run.py"
        assert entry.main([*asked, *small] if asked[0] == "train" else asked) == 0
        names = tmp_path / "runs" / "mine" / "clusters" / "last" / "names.yaml"
        if asked[0] == "clusters":
            names.write_text(names.read_text().replace('"cluster 7"', '"moss"'))
    with (tmp_path / "my" / "segments" / "areas.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == 12
    assert "moss" in rows[0]
    assert "cluster 7" not in rows[0]


def tree_with_the_examples(parent: Path) -> Path:
    """A copy of the tree with the files of the walk-throughs at their places."""
    copy = parent / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "__pycache__"))
    for mark, name in FILES.items():
        (copy / name).write_text(next(block for block in blocks("python|yaml") if mark in block))
    return copy


@pytest.mark.train
@pytest.mark.timeout(600)
def test_a_method_with_a_bank_keeps_what_every_method_must(tmp_path):
    """The tests of every method find it in the copy: labels shuffled, the same bits; killed and resumed, the same
    weights."""
    copy = tree_with_the_examples(tmp_path)
    chosen = "patch_bank and (labels_never_reach or killed_run_goes_on)"
    words = ["-q", "-p", "no:cacheprovider", "tests/lightning_modules/test_methods.py", "-k", chosen]
    done = subprocess.run([sys.executable, "-m", "pytest", *words], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "2 passed" in done.stdout
    refused = [sys.executable, "run.py", "train", "method=patch_bank", "method.ema=2"]
    said = subprocess.run(refused, cwd=copy, capture_output=True, text=True)
    assert (said.returncode, said.stderr.strip()) == (2, "error: method.ema=2: expected a number from 0 to 1")


def garden(root: Path) -> Path:
    """Fifteen photos of bed, lawn and path under a strip without label; photo 0 has a colour of no table, photo 3 no
    label, and photo 7 is cut in half."""
    colours = np.array([(120, 70, 20), (60, 160, 60), (180, 180, 180), (0, 0, 0), (9, 9, 9)], np.uint8)
    (root / "photos").mkdir(parents=True)
    (root / "truth").mkdir()
    for i in range(15):
        values = np.arange(60)[None].repeat(48, 0) // 20
        Image.fromarray(colours[values]).save(root / "photos" / f"p_{i:04d}.jpg")
        values[:4] = 3
        values[4:6] = 4 if i == 0 else values[4:6]
        if i != 3:
            Image.fromarray(colours[values]).save(root / "truth" / f"gt_{i:04d}.png")
    cut = root / "photos" / "p_0007.jpg"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    return root


TINY = [
    "backbone=tiny", "trainer=cpu", "trainer.max_steps=4", "trainer.progress=none", "data.train_size=48",
    "data.eval_size=48", "data.batch_size=4", "data.workers=0", "run.dir=runs", "evaluation.kmeans.restarts=1",
    "evaluation.panels=0",
]  # fmt: skip

GARDEN = """
import sys
sys.path.insert(0, ".")
import config, run
from datamodules.base.module import load_datamodule
words = ["data=garden", f"data.root={sys.argv[1]}"]
module = load_datamodule("garden")(config.compose(words))
for split in ("train", "val"):
    source = module.build_source(split)
    print(split, len(source), len(source.labelled()))
picture, label = source.read(0)
print([label[row].reshape(3, 20)[:, 0].tolist() for row in (0, 5, 6, 47)], sorted(set(label.flat)) == [0, 1, 2, 255])
sys.exit(run.main(["train", *words, *sys.argv[2:]]))
"""


@pytest.mark.train
@pytest.mark.timeout(600)
def test_a_data_set_of_listed_files_is_read_and_trained_on(tmp_path):
    copy, root = tree_with_the_examples(tmp_path), garden(tmp_path / "garden")
    command = [sys.executable, "-c", GARDEN, str(root), "method=kmeans_baseline", *TINY]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[:2] == ["train 12 11", "val 3 3"]
    assert lines[2] == "[[255, 255, 255], [255, 255, 255], [0, 1, 2], [0, 1, 2]] True"
    page = next(block for block in blocks("text") if "photos/p_0007.jpg" in block)
    for said in page.splitlines():
        assert done.stderr.count(f"{root}/{said}") == 1, said


HARBOUR = """
import sys
sys.path.insert(0, ".")
import run
assert run.main(["data", "name=harbour"]) == 0
assert run.main(["data", "name=harbour", f"root={sys.argv[1]}"]) == 2
sys.exit(run.main(["train", "data=harbour", f"data.root={sys.argv[1]}", *sys.argv[2:]]))
"""


@pytest.mark.train
@pytest.mark.timeout(600)
def test_a_set_in_its_official_layout_is_checked_and_trained_on(tmp_path):
    """The mask of one photo is missing: the check names its folder, and the photo is trained on."""
    copy, root = tree_with_the_examples(tmp_path), tmp_path / "downloads"
    lines = (copy / "configs" / "data" / "camvid.yaml").read_text().replace("name: camvid", "name: harbour")
    kept = [line for line in lines.splitlines(keepends=True) if not line.startswith("eval_split:")]
    (copy / "configs" / "data" / "harbour.yaml").write_text("".join(kept))
    for split, count in (("train", 12), ("val", 4)):
        for i in range(count):
            values = (np.arange(60)[None].repeat(48, 0) // 15).astype(np.uint8)
            save(root / "harbour-1.0" / "photos" / split / f"{i:04d}.jpg", np.dstack([values * 60] * 3))
            save(root / "harbour-1.0" / "masks" / split / f"{i:04d}_mask.png", values)
    (root / "harbour-1.0" / "masks" / "train" / "0004_mask.png").unlink()
    command = [sys.executable, "-c", HARBOUR, str(root), "method=kmeans_baseline", *TINY]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = next(block for block in blocks("text") if "get harbour-1.0.zip" in block)
    assert page in done.stdout
    assert "fetch    harbour-1.0.zip: photos/ and masks/\n" in done.stdout
    assert "harbour: train of 12 pictures (11 with a label)" in done.stderr
    assert {"water", "quay", "ship"} <= set(re.findall(r"[a-z]+", done.stdout + done.stderr))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_method_and_a_data_set_from_the_readme_train(tmp_path):
    copy = tree_with_the_examples(tmp_path)
    stripes = (copy / "configs" / "data" / "folder.yaml").read_text().replace("name: folder", "name: stripes")
    (copy / "configs" / "data" / "stripes.yaml").write_text(stripes)
    words = ["method=colour_blind", "data=stripes", "data.train_size=96", "data.eval_size=96", "data.batch_size=8"]
    words += ["trainer.max_steps=30", "run.dir=runs", "run.name=x"]
    code = "import sys; sys.path.insert(0, '.'); import run; sys.exit(run.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "train", *words]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (copy / "runs" / "x" / "metrics.json").is_file()
