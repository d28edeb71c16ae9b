"""What data sets say of themselves, read from their source: no data set is imported for it, and with it no torch."""

import ast
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import about, source
from common.errors import ConfigError, DataError
from common.files import no_folder


@dataclass(frozen=True)
class Facts:
    """Where a data set comes from. Home pages only; what lies behind a registration is not linked."""

    title: str
    home: str
    terms: str
    downloads: tuple[str, ...]
    notes: tuple[str, ...] = ()


def available() -> list[str]:
    """Names of the data sets: the files of `datamodules` that have a yaml in configs/data."""
    configs = about.ROOT / "configs" / "data"
    found = [path.stem for path in (about.ROOT / "datamodules").iterdir() if path.suffix == ".py" or path.is_dir()]
    return sorted(name for name in found if (configs / f"{name}.yaml").exists())


def summary(name: str) -> str:
    """The first line of a data set's file. Raises ConfigError where it cannot be read."""
    return source.summary(about.module_of("datamodules", name))


def facts(name: str) -> Facts | None:
    """Where a published data set comes from; None of one that states nothing. Raises ConfigError for no such file.

    Raises ValueError where they are no plain text of its source, or of the class that they are taken from: the class
    has to be asked.
    """
    module = about.module_of("datamodules", name)
    for node in source.tree(module).body:
        if isinstance(node, ast.ClassDef) and (found := declared(module, node)) is not None:
            return found
    return None


def declared(module: str, node: ast.ClassDef) -> Facts | None:
    """`facts` of a class: its own, or those of the class that it inherits from. Raises ValueError, see `facts`."""
    for place, item in source.lineage(module, node):
        value = source.value(item, "facts")
        if value is not None:
            return evaluated(place, value)
    return None


def evaluated(module: str, value: ast.expr) -> Facts:
    """`Facts(title="…", …)`, or `replace(Base.facts, title="…")`. Raises ValueError for any other expression."""
    match value:
        case ast.Call(func=ast.Name(id="Facts"), args=[], keywords=given):
            return Facts(**literals(given))
        case ast.Call(func=ast.Name(id="replace"), args=[ast.Attribute(value=base, attr="facts")], keywords=given):
            found = source.find(module, base)
            own = None if found is None else declared(*found)
            if own is not None:
                return dataclasses.replace(own, **literals(given))
    raise ValueError(f"{module}: facts = {ast.unparse(value)}")


def literals(given: list[ast.keyword]) -> dict[str, Any]:
    """Arguments by name. Raises ValueError where one is no plain value."""
    return {item.arg: ast.literal_eval(item.value) for item in given if item.arg is not None}


def expect_root(name: str, data: Mapping[str, Any]) -> None:
    """Raises ConfigError where a data set reads folders and none is named, DataError for one that is not there.

    data: its keys, of which `root` and `train_roots` are looked at where they are.
    """
    if not (published := is_published(name)) and name != "folder":
        return
    remedy = f"; `run.py data name={name}` says what to fetch and where it belongs" if published else ""
    if "root" in data and not data["root"]:
        raise ConfigError(f"data.root: data={name} needs a folder of pictures; set data.root=<folder>{remedy}")
    roots = [("data.root", data.get("root")), *(("data.train_roots", root) for root in data.get("train_roots") or ())]
    for key, root in roots:
        if root and not (path := Path(root).expanduser()).is_dir():
            raise DataError(f"{key}={path}: {no_folder(path)}{remedy}")


def is_published(name: str) -> bool:
    """Whether a data set states where it comes from."""
    try:
        return facts(name) is not None
    except ValueError:
        return True
