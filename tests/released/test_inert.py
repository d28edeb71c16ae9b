"""Files of others are read as data: equal to torch's reader where that reads them, and nothing of them ever runs."""

import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from common.errors import CheckpointError
from released.inert import Inert, InertFile, mapping, setting


def archive(path: Path, data: bytes, **entries: bytes) -> Path:
    """A zip like those of torch.save around any pickle."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("x/data.pkl", data)
        for name, content in entries.items():
            made.writestr(f"x/data/{name.removeprefix('storage')}", content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        InertFile(path)
    return str(caught.value)


def unreadable(path: Path) -> str:
    return (
        f"file={path}: cannot be read as a file of torch.save (cut off, of another format, or older than torch 1.6: "
        "such a file has to be saved anew with a newer torch)"
    )


def test_tensors_are_those_of_torch(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    content = OrderedDict(
        plain=base, turned=base.T, cut=base[1:3, ::2], same=base, one=torch.tensor(3.5), none=torch.zeros(0, 4),
        wide=torch.ones(1).expand(3, 5), half=base.half(), bf16=base.bfloat16(), double=base.double(),
        ids=torch.arange(5), bytes=torch.arange(5, dtype=torch.uint8), truth=torch.tensor([True, False]),
        parameter=nn.Parameter(base.clone()),
    )  # fmt: skip
    torch.save({"state": content, "step": 7, "name": "x", "list": [1, 2.5]}, tmp_path / "a.pt")
    file = InertFile(tmp_path / "a.pt")
    expected = torch.load(tmp_path / "a.pt", weights_only=True)
    assert {key: file.content[key] for key in ("step", "name", "list")} == {"step": 7, "name": "x", "list": [1, 2.5]}
    found = mapping(file.content["state"])
    assert list(found) == list(expected["state"])
    for key, value in expected["state"].items():
        tensor = file.tensor(found[key])
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value.detach()), key
    assert file.objects == []
    assert file.tensor("text") is None


def test_settings_of_omegaconf_are_read_as_values(tmp_path):
    cfg = OmegaConf.create({"dim": 70, "lr": 5e-4, "name": "x", "on": True, "none": None, "list": [1], "bad": "${dim}"})
    torch.save({"cfg": cfg}, tmp_path / "a.pt")
    file = InertFile(tmp_path / "a.pt")
    values = {key: setting(value) for key, value in mapping(file.content["cfg"]).items()}
    assert values == {
        "dim": 70, "lr": 5e-4, "name": "x", "on": True, "none": None, "list": None, "bad": "${dim}",
    }  # fmt: skip
    assert "omegaconf.dictconfig.DictConfig" in file.objects
    assert setting(float("nan")) is None


class Call:
    """Pickles as a call of anything."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
def test_a_malicious_pickle_does_not_run(tmp_path, protocol):
    """Calls of every kind, in every protocol: with torch.load(weights_only=False) each would leave a trace."""
    traces = [tmp_path / f"trace{i}" for i in range(4)]
    content = {
        "command": Call(os.system, f"touch {traces[0]}"),
        "code": Call(exec, f"open({str(traces[1])!r}, 'w')"),
        "file": Call(open, str(traces[2]), "w"),
        "nested": [Call(eval, f"__import__('os').mkdir({str(traces[3])!r})")],
    }
    path = archive(tmp_path / "a.pt", pickle.dumps(content, protocol))
    file = InertFile(path)
    assert not any(trace.exists() for trace in traces)
    assert isinstance(file.content["command"], Inert)
    assert file.content["command"].arguments == (f"touch {traces[0]}",)
    assert {name.rpartition(".")[2] for name in file.objects} == {"system", "exec", "open", "eval"}
    with zipfile.ZipFile(path) as made:  # the same bytes are live ones
        pickle.loads(made.read("x/data.pkl"))
    assert all(trace.exists() for trace in traces)


def test_a_pickle_cannot_change_this_process(tmp_path):
    """State put onto a name (a function's code, a class's attributes) and onto what a name gave."""
    before = torch._utils._rebuild_tensor_v2.__defaults__
    head = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
    onto_the_function = head + b"N}(X\x0c\x00\x00\x00__defaults__)u\x86b."
    assert refusal(archive(tmp_path / "a.pt", onto_the_function)) == unreadable(tmp_path / "a.pt")
    onto_the_object = head + b")R}(X\x04\x00\x00\x00nameX\x01\x00\x00\x00yub."
    content = InertFile(archive(tmp_path / "b.pt", onto_the_object)).content
    assert content.state == {"name": "y"}
    assert type(content).name == "torch._utils._rebuild_tensor_v2"
    assert Inert.name == ""
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before
    called = head + b")R)R."  # what a name gave cannot be called
    assert refusal(archive(tmp_path / "c.pt", called)) == unreadable(tmp_path / "c.pt")


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02}r" + struct.pack("<I", 1 << 30) + b".",  # a memo of a thousand million entries
        b"\x80\x02\x82\x01.",  # the extension table of this process
        b"\x80\x02U\x01xQ.",  # a persistent id that is no storage
        b"\x80\x02(U\x07storagecos\nsystem\nK\x01U\x03cpuK\x01tQ.",  # a storage whose key is no text
        b"\x80\x02}",
        b"",
        b"hello",
    ],
)
def test_other_pickles_are_refused(tmp_path, data):
    assert refusal(archive(tmp_path / "a.pt", data)) == unreadable(tmp_path / "a.pt")


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    assert refusal(path) == f"file={path}: no such file; give the checkpoint that the authors released"
    torch.save({"x": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    assert refusal(path) == unreadable(path)
    torch.save({"x": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert refusal(path) == unreadable(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:  # what unpacks to more than it looks
        made.writestr("x/data.pkl", pickle.dumps("a" * 10000))
    assert refusal(path) == unreadable(path)


def tensor_of(path: Path, size: tuple, stride: tuple, offset: int = 0, stored: bytes = bytes(16), count: int = 4):
    """A tensor record with these arguments in a file whose storage has these bytes."""

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", count) if value == "here" else None

    with (path.with_suffix(".pkl")).open("wb") as handle:
        Writer(handle, 2).dump(Call(torch._utils._rebuild_tensor_v2, "here", offset, size, stride, False, None))
    file = InertFile(archive(path, path.with_suffix(".pkl").read_bytes(), storage0=stored))
    return file.tensor(file.content)


def test_tensors_beyond_their_bytes_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    assert tensor_of(path, (2, 2), (2, 1)).shape == (2, 2)
    assert tensor_of(path, (1 << 20,), (0,)).shape == (1 << 20,)
    for changes in (
        {"size": (3, 2), "stride": (2, 1)},
        {"size": (4,), "stride": (1,), "offset": 1},
        {"size": (2,), "stride": (-1,)},
        {"size": (2,), "stride": (1, 1)},
        {"size": (2.0,), "stride": (1,)},
        {"size": [4], "stride": (1,)},
        {"size": (1 << 70,), "stride": (0,)},
        {"size": (4,), "stride": (1,), "stored": bytes(12)},
        {"size": (1000,), "stride": (1,), "count": 1000},
    ):
        with pytest.raises(CheckpointError) as caught:
            tensor_of(path, **changes)
        assert str(caught.value) == unreadable(path), changes
