"""What this project is called, which version it is, and under which licence it stands."""

import tomllib
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

LICENCE = "MIT"


def version() -> str:
    """The version: that of pyproject.toml beside the source, else of the installed package."""
    source = ROOT / "pyproject.toml"
    if source.is_file():
        return tomllib.loads(source.read_text(encoding="utf-8"))["project"]["version"]
    return metadata.version("labelfree")


def signature() -> str:
    """`Labelfree 0.1.0 (MIT licence)`."""
    return f"Labelfree {version()} ({LICENCE} licence)"


def module_of(room: str, name: str) -> str:
    """The module that holds a method or a data set: `<room>/<name>.py`, `<room>/<name>/module.py`, or, where methods of
    one kind share a folder, `<room>/<folder>/<name>.py`."""
    if (ROOT / room / name).is_dir():
        return f"{room}.{name}.module"
    shared = [] if (ROOT / room / f"{name}.py").is_file() else sorted((ROOT / room).glob(f"*/{name}.py"))
    return f"{room}.{shared[0].parent.name}.{name}" if shared else f"{room}.{name}"
