"""Checkpoints of others, read as data: nothing that such a file names is looked up, imported or called.

A file of `torch.save` is a zip archive of a pickle and the bytes of its tensors. The pickle builds its objects out of
names (`omegaconf.dictconfig.DictConfig`, `torch._utils._rebuild_tensor_v2`, `os.system`) and calls on them. Here every
name, known or not, becomes an `Inert` record that keeps what it is given; tensors are made afterwards, out of records
whose arguments were checked. So the reader needs no list of harmless names, and no name is harmless or harmful.
"""

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from common.errors import CheckpointError
from released.asked import expect_file

LARGEST_PICKLE = 1 << 26
"""Bytes of the pickle; tensors lie outside of it. A million entries fit."""

DTYPES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
MAPPINGS = ("collections.OrderedDict", "collections.defaultdict", "pytorch_lightning.utilities.parsing.AttributeDict")
CONTAINERS = ("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig")
ORDINARY = (*DTYPES, TENSOR, PARAMETER, *MAPPINGS[:1], "torch.Size", "torch.device")
"""Names that `torch.load(weights_only=True)` takes too and that a file of tensors alone holds."""


class Inert:
    """An object of a file: the name of its class or function, and all that the file puts into it.

    It has no `__dict__` and its instances cannot be called, so the file can change nothing but these records.
    """

    __slots__ = ("arguments", "items", "members", "state")
    name: ClassVar[str] = ""

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        made = super().__new__(cls)
        made.arguments, made.state, made.items, made.members = (*arguments, *named.values()), None, {}, []
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, value: Any) -> None:
        self.members.append(value)

    add = append


class Storage(NamedTuple):
    """The bytes of a tensor, not read yet."""

    kind: str
    key: str
    count: int


class InertUnpickler(pickle.Unpickler):
    """The standard unpickler, whose every name is a record of its own and whose storages stay where they are."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.names: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        full = f"{module}.{name}"
        if full not in self.names:
            self.names[full] = type("Inert", (Inert,), {"__slots__": (), "name": full})
        return self.names[full]

    def persistent_load(self, pid: Any) -> Storage:
        word, kind, key, _, count = pid
        sound = word == "storage" and isinstance(kind, type) and type(key) is str and type(count) is int
        if not sound or not issubclass(kind, Inert):
            raise pickle.UnpicklingError("not the storage of a tensor")
        return Storage(kind.name, key, count)


class InertFile:
    """A file of `torch.save`, read as data.

    Attributes:
        content: the object of the file, with `Inert` in place of whatever is no plain value.
        objects: names in the file beyond those of tensors, in the order of the file.

    Raises:
        CheckpointError: no such file, cut off, compressed, or of another format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        expect_file(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = {info.filename.partition("/")[2]: info for info in archive.infolist()}
                # torch never compresses, so what looks small is small.
                if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
                    raise ValueError("compressed")
                if entries["data.pkl"].file_size > LARGEST_PICKLE:
                    raise ValueError("not a state dict")
                if "byteorder" in entries and archive.read(entries["byteorder"]) != b"little":
                    raise ValueError("big-endian")
                data = archive.read(entries["data.pkl"])
            self.entries = entries
            for opcode, argument, _ in pickletools.genops(data):
                # A PUT reserves memory for its number; an EXT looks into a table of this process.
                if opcode.name.startswith("EXT") or (opcode.name.endswith("PUT") and argument > len(data)):
                    raise ValueError("not written by torch")
            reader = InertUnpickler(data)
            self.content = reader.load()
        except Exception as error:  # a broken pickle raises whatever its wrong operands raise
            raise self.unreadable() from error
        self.objects = [name for name in reader.names if name not in ORDINARY]

    def unreadable(self) -> CheckpointError:
        return CheckpointError(
            f"file={self.path}: cannot be read as a file of torch.save (cut off, of another format, or older than "
            "torch 1.6: such a file has to be saved anew with a newer torch)"
        )

    def tensor(self, value: Any) -> Tensor | None:
        """The tensor of a record, in the shape of the file and perhaps in overlapping memory; None for other values.

        Raises CheckpointError where its bytes are not all there.
        """
        if isinstance(value, Inert) and value.name == PARAMETER and value.arguments:
            value = value.arguments[0]
        if not isinstance(value, Inert) or value.name != TENSOR or len(value.arguments) < 4:
            return None
        storage, offset, size, stride = value.arguments[:4]
        if not isinstance(storage, Storage) or storage.kind not in DTYPES:
            return None
        numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [-1]
        if not all(type(number) is int and number >= 0 for number in numbers) or len(size) != len(stride):
            raise self.unreadable()
        dtype, entry = DTYPES[storage.kind], self.entries.get(f"data/{storage.key}")
        last = offset + sum((count - 1) * step for count, step in zip(size, stride, strict=True))
        whole = entry is not None and entry.file_size == storage.count * dtype.itemsize
        if not whole or (0 not in size and last >= storage.count):
            raise self.unreadable()
        if 0 in size:
            return torch.zeros(size, dtype=dtype)
        try:
            with zipfile.ZipFile(self.path) as archive:
                values = torch.frombuffer(bytearray(archive.read(entry)), dtype=dtype)
            return values.as_strided(size, stride, offset)
        except (zipfile.BadZipFile, OSError, RuntimeError, TypeError) as error:  # a wrong check sum, absurd sizes
            raise self.unreadable() from error


def mapping(value: Any) -> Mapping[Any, Any] | None:
    """The entries of a dict, an OrderedDict and the like, or of an OmegaConf mapping; None for other values."""
    if isinstance(value, Inert) and value.name in MAPPINGS:
        return value.items
    if isinstance(value, Inert) and value.name in CONTAINERS:
        value = members(value).get("_content")
    return value if isinstance(value, dict) else None


def setting(value: Any) -> Any:
    """A finite number, truth value or printable text, also out of a node of OmegaConf; None for anything else."""
    if isinstance(value, Inert) and value.name.startswith("omegaconf.nodes."):
        value = members(value).get("_val")
    if (type(value) is float and not math.isfinite(value)) or (type(value) is str and not value.isprintable()):
        return None
    return value if type(value) in (bool, int, float, str) else None


def members(value: Inert) -> dict[Any, Any]:
    """The attributes that the file gave an object."""
    state = value.state
    if isinstance(state, tuple) and len(state) == 2:  # of a class with slots
        state = state[1]
    return state if isinstance(state, dict) else {}
