"""Words of make: each target hands on what its help names, and refuses whatever else stands on the command line."""

import re
import subprocess
from pathlib import Path

import pytest

import run

ROOT = Path(run.__file__).parent
TEXT = (ROOT / "Makefile").read_text()
TARGETS = re.findall(r"^([a-z-]+):.*## (.*)\n((?:\t.*\n)*)", TEXT, re.M)


def make(*words: str, **variables: str) -> subprocess.CompletedProcess:
    command = ["make", "--no-print-directory", "-n", "PY=python", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", **variables})


def refused(*words: str) -> str:
    done = make(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    return done.stderr.split("*** ")[1].removesuffix(".  Stop.\n")


def variables(text: str) -> set[str]:
    """The variables of make that a text expands, with those inside of them."""
    found = set(re.findall(r"\$\(([A-Z][A-Z0-9]*)\)", text))
    inner = {name: line for name in found for line in re.findall(rf"^{name} = ((?:.*\\\n)*.*)", TEXT, re.M)}
    return (found - set(inner)).union(*(variables(line) for line in inner.values()))


@pytest.mark.parametrize(("target", "text", "recipe"), [pytest.param(*found, id=found[0]) for found in TARGETS])
def test_the_help_of_a_target_names_what_it_takes(target, text, recipe):
    told = set(re.findall(r"([A-Z][A-Z0-9_]*)=", text)) - {"LABELFREE_REALDATA"}
    assert told == variables(recipe) - {"PY", "VENV", "PYTHON3", "READY", "MAKEFILE", "PARALLEL"}


@pytest.mark.parametrize("target", ["train", "pseudo", "show-config", "slurm"])
def test_seed_steps_and_name_reach_a_training(target):
    words = make(target, "METHOD=stego", "SEED=3", "STEPS=40", "NAME=mine", "ARGS=data.workers=0").stdout.split()
    assert {"method=stego", "seed=3", "trainer.max_steps=40", 'run.name="mine"', "data.workers=0"} < set(words)


def test_compare_and_sweep_take_steps():
    assert 'name="a"' in (shown := make("compare", "METHODS=stego", "STEPS=40", "NAME=a").stdout)
    assert "trainer.max_steps=40" in shown
    shown = make("sweep", "METHOD=stego", "SWEEP=stego_grid", "SEED=3").stdout.split()
    assert {"sweep=stego_grid", "method=stego", "seed=3"} < set(shown)


def test_a_word_that_no_target_takes_is_refused():
    assert refused("train", "METHOD=stego", "SEEED=3") == "SEEED: is no word of make train; did you mean SEED"
    assert refused("train", "seed=3") == "seed: is no word of make train; did you mean SEED"
    assert refused("compare", "METHOD=stego") == "METHOD: is no word of make compare; did you mean METHODS"
    assert refused("train", "data.root=/x") == (
        'data.root: is no word of make train; settings go into ARGS="data.root=…"'
    )
    assert refused("eval", "CKPT=x", "SEED=3") == (
        "SEED: is no word of make eval; it takes ARGS CKPT; variables of the environment stand before make"
    )
    assert refused("METHOD=stego") == "METHOD: name a target first, as in make train METHOD=stego"


def test_a_word_that_is_no_target_is_refused_before_anything_is_made():
    assert refused("train", "stego") == (
        "stego: is no target of make; make alone lists them; other words have a name before them, as in make train "
        "METHOD=stego"
    )
    assert refused("traim", "METHOD=stego") == "traim: is no target of make; did you mean train"


def test_what_stands_in_the_environment_is_taken_but_for_the_name():
    shown = make("train", SEED="3", METHOD="stego", NAME="host", EDITOR="vi", OMP_NUM_THREADS="1").stdout.split()
    assert shown == ["python", "run.py", "train", "method=stego", "seed=3"]


def test_two_targets_take_the_words_of_both():
    assert make("lint", "test", "JOBS=3").returncode == 0


def test_a_bare_training_says_which_method_it_is(caplog):
    caplog.set_level("INFO", "labelfree")
    run.say_default(["data=scenes", "method=stego"])
    run.say_default(["experiment=hsg_scenes"])
    assert not caplog.text
    run.say_default(["seed=3"])
    assert "no method is named, so this is kmeans_baseline: k-means on frozen features, the row that" in caplog.text
    assert make("train", "SEED=3").stdout.split() == ["python", "run.py", "train", "seed=3"]
