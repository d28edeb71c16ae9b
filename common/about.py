"""What this project is called, which version it is, and under which licence it stands."""

import tomllib
from importlib import metadata
from pathlib import Path

LICENCE = "MIT"


def version() -> str:
    """The version: that of pyproject.toml beside the source, else of the installed package."""
    source = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if source.is_file():
        return tomllib.loads(source.read_text(encoding="utf-8"))["project"]["version"]
    return metadata.version("labelfree")


def signature() -> str:
    """`Labelfree 0.1.0 (MIT licence)`."""
    return f"Labelfree {version()} ({LICENCE} licence)"
