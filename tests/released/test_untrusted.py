"""No file that is loaded can run code: a pickle that would leave a trace on disk, behind every door."""

import ast
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import run
from models.feature_store import FeatureStore, facts_path
from retrieval import neighbours
from tests.conftest import small_words

ROOT = Path(run.__file__).parent
PRODUCT = ("common", "datamodules", "models", "losses", "retrieval", "grouping", "evaluation", "lightning_modules",
           "engine", "launch", "run.py", "config.py")  # fmt: skip
METHOD = "kmeans_baseline"


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.trace,)


def archive(content: Any, path: Path) -> None:
    torch.save(content, path)


def plain_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


FORMATS = [archive, plain_pickle, legacy]


@pytest.fixture
def trace(tmp_path) -> Path:
    return tmp_path / "trace"


def refused(capsys, trace: Path, *words: object) -> str:
    """The one line with which a command ends; no trace was left."""
    code = run.main([str(word) for word in words])
    err = capsys.readouterr().err
    assert not trace.exists()
    assert code == 2, err
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


@pytest.mark.parametrize("write", FORMATS)
def test_the_payload_is_live(write, trace, tmp_path):
    write({"x": Payload(trace)}, tmp_path / "file")
    with (tmp_path / "file").open("rb") as handle:
        torch.load(handle, weights_only=False) if write is not plain_pickle else pickle.load(handle)
    assert trace.is_dir()


def checkpoint(small_run, trace: Path) -> dict[str, Any]:
    """A real checkpoint but for one entry."""
    content = small_run(METHOD).checkpoint
    return {**content, "callbacks": {**content["callbacks"], "more": Payload(trace)}}


@pytest.mark.train
@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("door", ["eval", "predict", "run.resume"])
def test_checkpoints_that_a_user_names(door, write, small_run, trace, tmp_path, capsys):
    path = tmp_path / "x.ckpt"
    write(checkpoint(small_run, trace), path)
    (tmp_path / "in").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "in" / "a.png")
    words = {
        "eval": ["eval", f"ckpt={path}"],
        "predict": ["predict", f"ckpt={path}", f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}"],
        "run.resume": ["train", *small_words(METHOD, f"run.dir={tmp_path}", "run.name=n", f"run.resume={path}")],
    }
    assert f"ckpt={path}: cannot be read as a checkpoint (" in refused(capsys, trace, *words[door])


@pytest.mark.train
@pytest.mark.parametrize("write", FORMATS)
def test_the_checkpoint_in_a_run_folder(write, small_run, trace, tmp_path, capsys):
    """An archive that is whole is refused; what is no archive counts as damaged, and the run begins anew."""
    folder = tmp_path / "r"
    (folder / "checkpoints").mkdir(parents=True)
    stored = yaml.safe_load((small_run(METHOD).folder / "config.yaml").read_text())
    stored["run"] |= {"dir": str(tmp_path), "name": "r"}
    (folder / "config.yaml").write_text(yaml.safe_dump(stored))
    for name in ("last", "previous", "best"):
        write(checkpoint(small_run, trace), folder / "checkpoints" / f"{name}.ckpt")
    words = ["train", *small_words(METHOD, f"run.dir={tmp_path}", "run.name=r")]
    if write is archive:
        assert "cannot be read as a checkpoint" in refused(capsys, trace, *words)
        (folder / "checkpoints" / "last.ckpt").unlink()  # those that would stand in for it
    assert run.main(words) == 0
    assert not trace.exists()
    assert (folder / "metrics.json").is_file()


@pytest.mark.parametrize("write", FORMATS)
def test_backbone_weights(write, trace, tmp_path, capsys):
    path = tmp_path / "w.pth"
    write({"state_dict": {}, "more": Payload(trace)}, path)
    words = small_words(METHOD, f"run.dir={tmp_path}", "run.name=n", f"backbone.weights={path}")
    assert f"backbone.weights={path}: " in refused(capsys, trace, "train", *words)


@pytest.mark.train
@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("origin", ["stego", "hp"])
def test_released_checkpoints(origin, write, trace, tmp_path, capsys):
    path = tmp_path / "released.ckpt"
    write({"state_dict": {"net": Payload(trace)}, "more": Payload(trace)}, path)
    words = [f"from={origin}", f"file={path}", f"output={tmp_path / 'out.ckpt'}", "data=potsdam3"]
    assert str(path) in refused(capsys, trace, "import-checkpoint", *words)


def objects(content: Any, path: Path) -> None:
    """The arrays of a table of neighbours, as pickled objects."""
    with path.open("wb") as handle:
        np.savez(handle, neighbours=np.array([content], dtype=object), fingerprint=np.array([content], dtype=object))


@pytest.mark.parametrize("write", [*FORMATS, objects])
def test_tables_in_the_cache(write: Callable, trace, tmp_path):
    write({"x": Payload(trace)}, tmp_path / "name.npz")
    made = torch.arange(6).view(3, 2)
    assert torch.equal(neighbours.cached(tmp_path, "name", lambda: made), made)
    assert not trace.exists()


def test_kept_features(trace, tmp_path):
    path = tmp_path / "features"
    for part in (path, facts_path(path)):
        plain_pickle({"x": Payload(trace)}, part)
    assert FeatureStore.find(path) is None
    assert not trace.exists()


def test_the_configuration_of_a_run_folder(trace, tmp_path, capsys):
    folder = tmp_path / "r"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (folder / "config.yaml").write_text(f"seed: !!python/object/apply:os.mkdir ['{trace}']\n")
    line = refused(capsys, trace, "train", *small_words(METHOD, f"run.dir={tmp_path}", "run.name=r"))
    assert line == (
        f"error: {folder / 'config.yaml'}: is not the configuration of a run (line 1); give the run another run.name"
    )


def test_no_other_door_is_open():
    """Every call in the product that could unpickle says that it does not."""
    asked = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    asked["torch.hub.load_state_dict_from_url"] = ("weights_only", True)
    closed = {"pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "joblib.load", "torch.hub.load"}
    files = [path for name in PRODUCT for path in (ROOT / name, *(ROOT / name).rglob("*.py")) if path.is_file()]
    found = set()
    for path in files:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in closed, f"{path}:{call.lineno}"
            if name not in asked:
                continue
            key, value = asked[name]
            given = {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg == key}
            assert given == {key: value}, f"{path}:{call.lineno}"
            found.add(name)
    assert found == {"torch.load", "np.load"}
