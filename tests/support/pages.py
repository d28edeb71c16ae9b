"""The README and the pages of docs/: their blocks of code, and the commands in them."""

import re
from pathlib import Path

import run as entry

ROOT = Path(entry.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(kind: str, pages: list[Path] = PAGES) -> list[str]:
    """The fenced blocks of a kind (a pattern: `python|yaml`)."""
    return [block for page in pages for block in re.findall(rf"```(?:{kind})\n(.*?)```", page.read_text(), re.S)]


def commands(pages: list[Path] = PAGES) -> list[str]:
    """Lines of the blocks that begin with make or python run.py, without their remarks; each once."""
    lines = [line for block in blocks("[a-z]*", pages) for line in block.splitlines()]
    found = [line.split(" #")[0].strip() for line in lines if re.match(r"(make|python run\.py) [a-z]", line)]
    return list(dict.fromkeys(found))
