"""Every command of the README and of docs/ runs, through make, with made-up files and small trainings.

Recipes with their large networks are `slow`; those that the pages of methods and docs/reproduce.md
name, a row each, are put together here and not run.
"""

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch

import config
import run as entry
from launch import submit, sweep
from tests.conftest import Run, small_words
from tests.datamodules import trees
from tests.datamodules.pictures import noise, save
from tests.released import released_files
from tests.support.pages import PAGES, ROOT, commands

SIZES = [
    "data.train_count=12", "data.val_count=2",
    "data.workers=0", "data.train_size=64", "data.eval_size=64", "data.batch_size=4", "data.eval_batch_size=2",
    "trainer.max_steps=2", "trainer.progress=none", "evaluation.panels=1", "evaluation.kmeans.restarts=1",
    "evaluation.kmeans.iterations=3", "evaluation.crf=none",
]  # fmt: skip


def is_recipe(command: str) -> bool:
    """A published setting, or one of the project's own."""
    return bool(re.search(r"\b(train|pseudo)\b.*\bexperiment=", command, re.I))


GUIDES = [page for page in PAGES if page.name != "reproduce.md" and page.parent.name != "methods"]
GUIDED = commands(GUIDES)
ALL = commands()
RUN = [command for command in ALL if command in GUIDED or not is_recipe(command)]


def marked(command: str) -> object:
    """Sweeps and comparisons train several times, recipes have large networks."""
    slow = re.search(
        r"make sweep|compare methods|compare METHODS|EVAL=|(train|pseudo).*EXPERIMENT|backbone=dino|imports/stego",
        command,
    )
    return pytest.param(command, marks=pytest.mark.slow) if slow else command


class World:
    """The folders and files that the README speaks of, made where a command names them. `/x` is `<root>/x`."""

    def __init__(self, root: Path, small_run: Callable[[str], Run]) -> None:
        self.root, self.small_run = root, small_run

    def make(self, command: str) -> str:
        """The command with its places below the root, all of them there."""
        for place in ("my/pictures", "pics"):
            for i in range(8 if f"/{place}" in command else 0):
                save(self.root / place / f"{'abcdefgh'[i]}.jpg", noise(60, 64, seed=i))
        for name in "abcdefgh" if "/my/masks" in command else "":
            square = np.zeros((60, 64), np.uint8)
            square[10:40, 10:40] = 255
            save(self.root / "my" / "masks" / f"{name}.png", square)
        if "data.root=camvid" in command:
            self.labelled(self.root / "camvid")
        if "/data/coco" in command:
            trees.coco(self.root / "data" / "coco")
        if "mine.yaml" in command:
            shutil.copy(ROOT / "launch" / "site.yaml", self.root / "mine.yaml")
        for name in dict.fromkeys(re.findall(r"\bruns/([a-z]+)", command)):
            method = "dino" if "backbone.safetensors" in command else "hsg" if "levels=all" in command else "stego"
            shutil.copytree(self.small_run(method).folder, self.root / "runs" / name)
        self.released(command)
        return re.sub(r"(?<![\w.])/(my|pics|data|out)\b", rf"{self.root}/\1", self.weights(command))

    def labelled(self, folder: Path) -> None:
        for split, count in (("train", 6), ("val", 2)):
            for i in range(count):
                picture = noise(60, 64, seed=i)
                save(folder / "images" / split / f"{i}.png", picture)
                save(folder / "labels" / split / f"{i}.png", picture[..., 0] % 3)
        (folder / "classes.json").write_text('["sky", "road", "tree"]')

    def released(self, command: str) -> None:
        if "stego.ckpt" in command:
            file = self.root / "cocostuff27_vit_base_5.ckpt"
            released_files.save(released_files.stego(classes=27, small=True, dataset_name="cocostuff27"), file)
            if "FROM=" not in command:
                words = ["from=stego", f"file={file}", f"output={self.root}/imports/stego.ckpt"]
                assert entry.main(["import-checkpoint", *words]) == 0
        if "ckpt.pth" in command:
            released_files.save(released_files.hp(small=True), self.root / "ckpt.pth")

    def weights(self, command: str) -> str:
        """`<file>`: random weights of the backbone that the command names."""
        if "<file>" not in command:
            return command
        file = self.root / "weights.pth"
        if "mobilenetv2" in command:
            torch.save(timm.create_model("mobilenetv2_100").state_dict(), file)
        else:
            drawn = released_files.dino(released_files.Draws(small=True), 384, 8)
            torch.save({name: value.clone().contiguous() for name, value in drawn.items()}, file)
        return command.replace("<file>", str(file))


FEWER = {
    "data.batch_size": "4", "evaluation.overcluster.k": "[12,20]", "evaluation.cbfe.clusters": "20",
    "evaluation.communities.clusters": "12", "evaluation.fcn.epochs": "1", "evaluation.posthoc.epochs": "1",
}  # fmt: skip
"""What an evaluation asks for that a run of a few small pictures cannot give, and what it gets in its place."""


def made_small(program: str, words: list[str]) -> list[str]:
    """The words with settings under which a training ends in seconds, on a CPU, without a hub."""
    given = dict(word.split("=", 1) for word in words)
    method = given.get("method", given.get("sweep", "kmeans_baseline").split("_grid")[0])
    groups = [f"{key}={given[key]}" for key in ("experiment", "data", "backbone") if key in given]
    known = config.flatten(config.compose([*groups, *([] if "experiment" in given else [f"method={method}"])]))
    more = [*SIZES, *(word for word in small_words(method) if "." in word)]
    if {"backbone", "experiment"} & set(given):
        more.append("backbone.weights=none")
    own = dict(reversed([word.split("=", 1) for word in more]))
    kept = ["seeds=0" if word.startswith("seeds=") else word for word in words if word != "trainer=gpu"]
    if program == "launch.sweep":
        kept += ["trials=1", f"run.dir={Path.cwd() / 'runs'}"]
    return [
        *kept,
        "trainer=cpu",
        *(f"{key}={value}" for key, value in own.items() if key in known and key not in given),
    ]


def parts_of(command: str) -> tuple[str, list[str]]:
    """The program that a command starts (run.py, launch.sweep, launch.submit), and its words."""
    if command.startswith("make"):
        make = ["make", "--no-print-directory", "-n", "-f", str(ROOT / "Makefile"), "PY=python"]
        shown = subprocess.run([*make, *shlex.split(command)[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
        command = shown.stdout.replace("\\\n", " ")
    _, *words = shlex.split(command)
    return (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])


def unreachable(*_: object, **__: object) -> None:
    """The hub, for a machine without a network."""
    raise ConnectionError("no network")


PROGRAMS = {"run.py": entry.main, "launch.sweep": sweep.main, "launch.submit": submit.main}


@pytest.mark.train
@pytest.mark.parametrize(
    "command", [marked(command) for command in RUN if not re.match("make (test|docs|lint|setup)", command)]
)
def test_it_runs(command, small_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, words = parts_of(World(tmp_path, small_run).make(command))
    if program == "launch.submit":
        words = [*words, "dry=true"] if "dry=true" not in words else words  # test-slurm submits for real
    elif program == "launch.sweep":
        words = made_small(program, words)
    elif "--help" in words:
        pass
    elif words[0] in ("train", "pseudo") or (words[0] == "compare" and "METHODS" in command.upper()):
        words = [words[0], *made_small(program, words[1:])]
    elif words[0] == "eval" and "imports" not in command:
        given = [word.split("=", 1) for word in words[1:]]
        words = [words[0], *(f"{key}={FEWER.get(key, value)}" for key, value in given)]
    elif words[0] == "eval":
        words += ["data.eval_size=64", "data.workers=0", "evaluation.crf=none", "evaluation.kmeans.pictures=2"]
    from_hub = words[0] == "weights" and len(words) > 1 and "backbone.weights" not in command
    if from_hub:
        for name in ("hf_hub_download", "get_hf_file_metadata"):
            monkeypatch.setattr(huggingface_hub, name, unreachable)
        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    code = PROGRAMS[program](words)
    incomplete = words[0] == "data" and any("root=" in word for word in words)  # the made-up tree lacks most pictures
    assert code == (2 if incomplete or from_hub else 0)


@pytest.mark.parametrize("command", [command for command in ALL if command not in RUN])
def test_it_is_a_recipe(command):
    program, (verb, *words) = parts_of(re.sub(r"<[a-z ]+>", "file.pth", command))
    assert program == "run.py"
    assert verb in ("train", "pseudo")
    config.compose(words)


def test_the_commands_are_found():
    found = [line.replace("python run.py", "make").split()[1] for line in ALL]
    assert len(found) >= 30
    assert set(found) > {"train", "predict", "eval", "compare", "sweep", "slurm", "data", "retrieve", "pseudo"}
