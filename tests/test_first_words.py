"""Lists, helps and wrong words answer before torch is imported, and say what is meant."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
import run
from common import about
from common.formats.commented import commented, heading
from engine.listing import listing
from launch import manual
from launch.words import expect_words
from lightning_modules import facts, registry

ROOT = Path(run.__file__).parent
HEAVY = ("torch", "lightning", "faiss", "timm", "kornia", "torchmetrics", "wandb")
PROGRAM = """
import os, sys
module, words = sys.argv[1], sys.argv[2:]
try:
    import importlib
    code = importlib.import_module(module).main(words)
finally:
    found = [name for name in {heavy} if name in sys.modules]
    times = os.times()
    print(code, f"{{times.user + times.system:.2f}}", *found, file=sys.stderr)
"""


def answered(module: str, *words: str) -> tuple[int, str, str, list[str]]:
    """(exit code, stdout, stderr without the measurement, heavy modules that were imported); below a second of CPU."""
    command = [sys.executable, "-c", PROGRAM.format(heavy=HEAVY), module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    *lines, last = done.stderr.splitlines()
    code, seconds, *found = last.split()
    assert float(seconds) < 1, last
    return int(code), done.stdout, "\n".join(lines), found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run train method=stegoo", "did you mean stego?"),
        ("run train methd=stego", "error: methd: no such key; did you mean method?"),
        ("run train trainer.max_step=5", "did you mean trainer.max_steps?"),
        ("run train seed=x", "error: seed=x: expected a whole number"),
        ("run pseudo method=stego method.dimm=3", "did you mean method.dim?"),
        ("run eval ckpt=none.ckpt", "error: ckpt=none.ckpt: no such file"),
        ("run predict ckpt=x input=y", "error: output: is needed"),
        ("run retrieve ckpt=x", "error: image: is needed"),
        ("run export ckpt=x output=y", "error: ckpt=x: no such file"),
        ("run import-checkpoint from=stego", "error: file: is needed"),
        ("run compare methods=stego seeds=a", "error: seeds=a: expected a whole number"),
        ('run compare methods=stego seeds=0 stego:method.dimm=3', "did you mean method.dim?"),
        ("run data name=camvidd", "did you mean camvid?"),
        ("run weights backbone=tinny", "did you mean tiny?"),
        ("run doctor seeed=1", "did you mean seed?"),
        ("run list method=stegoo", "did you mean stego?"),
        ("run list seed=3", "error: seed=3: list takes experiment, method, data, backbone, trainer"),
        ("run tran", "error: tran: no such command; did you mean train?"),
        ("run help tran", "error: tran: no such command; did you mean train?"),
        ("launch.sweep sweep=stego_gird", "did you mean stego_grid?"),
        ("launch.sweep sweep=stego_grid offline=true method.dimm=3", "did you mean method.dim?"),
        ("launch.submit method=stegoo", "did you mean stego?"),
    ],
)  # fmt: skip
def test_a_wrong_word_answers_without_torch(words, said):
    code, _, err, found = answered(*words.split())
    assert code == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not found


@pytest.mark.parametrize("words", ["list", "list method=stego", "train --help", "help predict", "help", "show-config"])
def test_lists_and_helps_answer_without_torch(words):
    code, out, err, found = answered("run", *words.split())
    assert (code, err, found) == (0, "", [])
    assert len(out.splitlines()) > 5


def test_a_reader_that_goes_away_is_no_fault():
    command = f"{sys.executable} run.py list | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 141)  # it may be done before the reader goes
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""


def test_a_key_that_the_run_of_a_checkpoint_lacks_ends_before_it_is_read(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    expect_words(checkpoint, ["whatever.it=is"])  # nothing is known of it
    config.save(config.compose(["method=stego"]), tmp_path / "config.yaml")
    expect_words(checkpoint, ["data.root=/x", "method=stego"])
    with pytest.raises(run.ConfigError, match=r"did you mean data\.root"):
        expect_words(checkpoint, ["data.rot=/x"])
    for text in ("a: [", "3", "method: 3\ndata: {}\nbackbone: {}"):
        (tmp_path / "config.yaml").write_text(text)
        expect_words(checkpoint, ["data.rot=/x"])


@pytest.mark.parametrize("name", config.names("method"))
def test_facts_that_are_read_are_those_of_the_class(name):
    found, cls = facts.facts(name), registry.method_class(name)
    for key in ("title", "headline", "uses_labels", "trains"):
        value = getattr(found, key)
        assert value == getattr(cls, key) or value is None
    assert found.headline
    assert found.title
    assert 40 < len(found.summary) <= 117
    assert found.summary.endswith(".")


def test_facts_follow_imports_and_settings(tmp_path, monkeypatch):
    """A base that is imported as a module, a renamed one, scores of an own classifier, a fact that settings decide."""
    folder = tmp_path / "lightning_modules"
    folder.mkdir()
    (folder / "base.py").write_text("class UnsupervisedSegmenter:\n    headline = 'cluster'\n    uses_labels = False\n")
    (folder / "one.py").write_text(
        "from lightning_modules import base as b\nclass One(b.UnsupervisedSegmenter):\n    uses_labels: bool = True\n"
    )
    (folder / "two.py").write_text(
        "from lightning_modules.one import One as Old\nclass Two(Old):\n    def scores(self, x): ...\n"
        "    def build(self):\n        self.uses_labels = self.cfg.labels\n"
    )
    monkeypatch.setattr(about, "ROOT", tmp_path)
    facts.source.cache_clear()
    try:
        assert facts.declared("lightning_modules.one", "One", "uses_labels") is True
        assert facts.declared("lightning_modules.one", "One", "headline") == "cluster"
        assert facts.declared("lightning_modules.two", "Two", "uses_labels") is None
        assert facts.declared("lightning_modules.two", "Two", "headline") == "own"
        (node,) = (item for item in facts.source("lightning_modules.two").body if isinstance(item, ast.ClassDef))
        assert facts.is_method("lightning_modules.two", node)
    finally:
        facts.source.cache_clear()


def test_a_list_of_one_says_what_it_is_and_takes():
    lines = list(listing(["method=stego"]))
    assert lines[0].startswith("method      stego: STEGO (Hamilton et al., ICLR 2022): ")
    assert "sweep       stego, stego_grid, stego_label_free" in lines
    recipes = [line.split()[1] for line in lines if line.startswith("experiment")]
    assert recipes == [name for name in config.names("experiment") if name.startswith("stego_")]
    known = config.flatten(config.compose(["method=stego"]))
    taken = [line.split("=")[0].strip() for line in lines if line.startswith("  method.")]
    assert set(taken) == {key for key in known if key.startswith("method.")} - {"method.name"}
    both = list(listing(["method=stego", "data=potsdam3"]))
    assert [line.split()[1] for line in both if line.startswith("experiment")] == ["stego_potsdam3_vits8"]
    assert "experiment  no recipe has method=kmeans_baseline" in listing(["method=kmeans_baseline"])


def test_every_word_of_a_command_has_a_meaning():
    for command in run.COMMANDS.values():
        call = command.__doc__.partition(": ")[0]
        assert set(re.findall(r"([a-z]+)=", call)) - {"key"} <= set(manual.MEANING), call


def test_help_shows_the_values_that_words_give():
    text = "\n".join(manual.manual(run.COMMANDS["train"], ["method=stego", "trainer=debug"]))
    debug = config.compose(["method=stego", "trainer=debug"])
    assert f"  trainer.max_steps={debug.trainer.max_steps} " in text
    assert "  seed=0                            whole number; keys every draw of the run" in text


def test_words_behind_keys_of_a_yaml(tmp_path):
    path = tmp_path / "x.yaml"
    head = "# What it is,\n# in two lines.\n"
    path.write_text(f"{head}a: 1  # first\nb:\n  c: [1, 2]   # list # of two\n  d: {{}}\ne: {{f: 2, g: 3}}  # both\n")
    assert commented(path) == {
        "a": ("1", "first"), "b.c": ("[1, 2]", "list # of two"), "b.d": ("{}", ""),
        "e.f": ("2", "both"), "e.g": ("3", "both"),
    }  # fmt: skip
    assert heading(path) == "What it is, in two lines."
