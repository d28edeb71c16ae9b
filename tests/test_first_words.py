"""Lists, helps and wrong words answer before torch is imported, and say what is meant."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import config
import run
from common import about, source
from common.formats.commented import commented, heading
from datamodules import facts as data_facts
from datamodules.base.module import load_datamodule
from datamodules.base.official import OfficialDataModule
from engine.listing import listing
from launch import manual
from launch.words import expect_words
from lightning_modules import facts, registry
from lightning_modules.base.staged import StagedSegmenter
from models import published
from models.pretrained import origins

ROOT = Path(run.__file__).parent
HEAVY = ("torch", "lightning", "faiss", "timm", "kornia", "torchmetrics", "wandb", "matplotlib", "scipy", "optuna")
PROGRAM = """
import importlib, io, json, logging, os, sys, time

class Enough(BaseException):
    pass

class Output(io.StringIO):
    def write(self, text):
        done = super().write(text)
        if alone and "\\n" in text:
            raise Enough  # what follows the first line computes
        return done

answers = []
for alone, module, words in json.load(sys.stdin):
    begun, code = time.process_time(), None
    sys.stdout, sys.stderr = Output(), io.StringIO()
    logging.getLogger().handlers.clear()
    try:
        code = importlib.import_module(module).main(words)
    except Enough:
        pass
    found = [name for name in {heavy} if name in sys.modules]
    answers.append([code, sys.stdout.getvalue(), sys.stderr.getvalue(), found, time.process_time() - begun])
json.dump(answers, sys.__stdout__)
"""
WRONG = [
    ("run train method=stegoo", "did you mean stego?"),
    ("run train methd=stego", "error: methd: no such key; did you mean method?"),
    ("run train trainer.max_step=5", "did you mean trainer.max_steps?"),
    ("run train seed=x", "error: seed=x: expected a whole number"),
    ("run train --seed=3", "error: --seed=3: flags are not used here"),
    ("run train data=folder", "error: data.root: data=folder needs a folder of pictures; set data.root=<folder>"),
    ("run train data=folder data.root=TMP/no", "error: data.root=TMP/no: there is no such folder"),
    ("run train data=camvid", "set data.root=<folder>; `run.py data name=camvid` says what to fetch and where"),
    ("run train data=camvid data.root=TMP data.train_roots=[TMP/no]", "error: data.train_roots=TMP/no: there is no"),
    ("run train backbone.weights=TMP/no.pth", "error: backbone.weights=TMP/no.pth: no such file; give a .pth"),
    ("run train backbone=mobilenetv2_coral", "error: backbone.weights=null: the weights of mobilenetv2_coral come"),
    ("run train backbone=dinov3_vits16", "read its terms, then set backbone.acknowledge_licence=true"),
    ("run train trainer.threads=4096", "error: trainer.threads=4096: this machine has"),
    ("run train evaluation.resolutions=[32]", "error: evaluation.resolutions=[32]: training evaluates at"),
    ("run train run.name=a/b", "error: run.name=a/b: expected a plain folder name"),
    ("run train run.resume=TMP/no.ckpt", "error: run.resume=TMP/no.ckpt: no such file; expected auto, never or"),
    ("run pseudo method=stego method.dimm=3", "did you mean method.dim?"),
    ("run pseudo method=stego", "error: method=stego: has no offline stage; use `run.py train method=stego`"),
    ("run eval ckpt=none.ckpt", "error: ckpt=none.ckpt: no such file"),
    ("run eval ckpt=CKPT method=dino", "error: method=dino: a checkpoint keeps its method"),
    ("run eval ckpt=CKPT method.dim=3", "error: method.dim=3: a checkpoint keeps its method; it fits its weights"),
    ("run eval ckpt=CKPT logger=wandb", "error: logger=wandb: eval writes its scores into the run folder only"),
    ("run predict ckpt=x input=y", "error: output: is needed"),
    ("run predict ckpt=CKPT input=TMP/no output=TMP/o", "error: input=TMP/no: there is no such folder"),
    ("run predict ckpt=CKPT input=TMP output=TMP/o", "error: output=TMP/o: lies in the input folder"),
    ("run predict ckpt=CKPT input=TMP/checkpoints output=TMP/o names=TMP/n", "error: names=TMP/n: no such file"),
    ("run retrieve ckpt=x", "error: image: is needed"),
    ("run retrieve ckpt=CKPT image=TMP/a.png", "error: image=TMP/a.png: no such file; name one picture"),
    ("run explain ckpt=CKPT image=TMP/a.png point=3", "error: point=3: expected x,y, two whole numbers"),
    ("run explain ckpt=CKPT image=TMP/a.png point=3,4", "error: image=TMP/a.png: no such file; name one picture"),
    ("run clusters ckpt=CKPT sweep=9..6", "error: sweep=9..6: expected a range"),
    ("run clusters ckpt=CKPT k=0", "error: k=0: expected a whole number"),
    ("run export ckpt=x output=y", "error: ckpt=x: no such file"),
    ("run export ckpt=CKPT output=y", "error: output=y: expected a file that ends in .pt2"),
    ("run import-checkpoint from=stego", "error: file: is needed"),
    ("run import-checkpoint from=steg file=x output=y", "error: from=steg: no such release; did you mean stego?"),
    ("run import-checkpoint from=hp file=TMP/x output=TMP/y.ckpt", "error: file=TMP/x: no such file; give the"),
    ("run compare methods=stego seeds=a", "error: seeds=a: expected a whole number"),
    ("run compare methods=stego seeds=0 stego:method.dimm=3", "did you mean method.dim?"),
    ("run compare methods=stego eval=evaluation.crff=dense", "did you mean evaluation.crf?"),
    ("run compare methods=stego part=3", "error: part=3: expected i/n"),
    ("run compare methods=stego name=a/b", "error: name=a/b: expected a plain folder name"),
    ("run compare methods=stego checkpoint=x", "error: checkpoint=x: expected last or best, the one that is scored"),
    ("run compare runs=TMP", "error: runs: TMP holds no finished run (metrics.json is missing)"),
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
]  # fmt: skip
LISTS = ["list", "list method=stego", "train --help", "help predict", "help", "show-config", "data", "weights"]
FIRST = {
    "doctor": "packages     ok  python ",
    "data name=camvid": "camvid: CamVid, eleven classes",
    "data name=scenes": "scenes: The built-in data set: ",
    "weights backbone=dino_vits8": "dino_vits8: DINO on ImageNet-1k, no labels",
}
"""Commands that compute, and their first lines."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """One process answers everything: words -> (exit code, stdout, stderr, heavy modules so far, CPU seconds); and the
    folder that stands for TMP, whose checkpoint CKPT is empty."""
    folder = tmp_path_factory.mktemp("words")
    checkpoint = folder / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.touch()
    config.save(config.compose(["method=stego"]), folder / "config.yaml")
    asked = [words for words, _ in WRONG] + [f"run {words}" for words in (*LISTS, *FIRST)]
    told = [words.replace("CKPT", str(checkpoint)).replace("TMP", str(folder)).split() for words in asked]
    text = json.dumps([(" ".join(words) in FIRST, module, words) for module, *words in told])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(heavy=HEAVY)],
        cwd=ROOT, capture_output=True, text=True, input=text, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout), strict=True)), str(folder)


@pytest.mark.parametrize(("words", "said"), WRONG)
def test_a_wrong_word_answers_without_torch(answers, words, said):
    code, out, err, found, seconds = answers[0][words]
    assert (code, out, found) == (2, "", [])
    assert said.replace("TMP", answers[1]) in err
    assert len(err.splitlines()) == 1
    assert seconds < 0.8


@pytest.mark.parametrize("words", LISTS)
def test_lists_and_helps_answer_without_torch(answers, words):
    code, out, err, found, seconds = answers[0][f"run {words}"]
    assert (code, err, found) == (0, "", [])
    assert len(out.splitlines()) > 5
    assert seconds < 1


@pytest.mark.parametrize("words", list(FIRST))
def test_what_computes_has_its_first_line_without_torch(answers, words):
    _, out, err, found, seconds = answers[0][f"run {words}"]
    assert out.startswith(FIRST[words])
    assert (err, found) == ("", [])
    assert seconds < 0.5


@pytest.mark.parametrize("name", config.names("data"))
def test_facts_of_a_data_set_are_those_of_its_class(name):
    kind = load_datamodule(name)
    assert data_facts.facts(name) == getattr(kind, "facts", None)
    assert data_facts.is_published(name) == issubclass(kind, OfficialDataModule)


def test_facts_that_are_no_plain_text_are_asked_of_the_class(tmp_path, monkeypatch):
    folder = tmp_path / "datamodules"
    folder.mkdir()
    (folder / "one.py").write_text("class One:\n    facts = Facts(title='a', home='b', terms='c', downloads=('d',))\n")
    (folder / "two.py").write_text(
        "from datamodules.one import One\nclass Two(One):\n    facts = replace(One.facts, title='e')\n"
    )
    (folder / "three.py").write_text("class Three:\n    facts = made()\n")
    (folder / "four.py").write_text("class Four:\n    pass\n")
    monkeypatch.setattr(about, "ROOT", tmp_path)
    source.tree.cache_clear()
    try:
        assert data_facts.facts("two") == data_facts.Facts("e", "b", "c", ("d",))
        assert data_facts.facts("four") is None
        with pytest.raises(ValueError, match=r"datamodules\.three: facts = made\(\)"):
            data_facts.facts("three")
        assert data_facts.is_published("three")
    finally:
        source.tree.cache_clear()


@pytest.mark.parametrize("name", config.names("backbone"))
def test_the_list_of_weights_knows_what_timm_says(name):
    cfg = config.compose([f"backbone={name}"]).backbone
    found = published.origin(cfg)
    assert published.licence_of(cfg) == found.licence
    if cfg.weights == "hub":
        assert found.hub_id == origins.hub_repository(cfg.timm)


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
    expect_words(checkpoint, ["data.flip_p=0"])
    with pytest.raises(run.ConfigError, match="method=stego: a checkpoint keeps its method"):
        expect_words(checkpoint, ["method=stego"])
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
    assert found.staged == issubclass(cls, StagedSegmenter)
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
    source.tree.cache_clear()
    try:
        assert facts.declared("lightning_modules.one", "One", "uses_labels") is True
        assert facts.declared("lightning_modules.one", "One", "headline") == "cluster"
        assert facts.declared("lightning_modules.two", "Two", "uses_labels") is None
        assert facts.declared("lightning_modules.two", "Two", "headline") == "own"
        (node,) = (item for item in source.tree("lightning_modules.two").body if isinstance(item, ast.ClassDef))
        assert facts.inherits("lightning_modules.two", node, "UnsupervisedSegmenter")
    finally:
        source.tree.cache_clear()


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
    assert "experiment  no recipe has method=normalized_cut" in listing(["method=normalized_cut"])


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
