"""Yaml and json that people write, read with limits: what no reader can take is one reason, not a traceback.

A file of a few hundred bytes can stand for millions of values (aliases of yaml), or be nested deeper than Python goes.
"""

import json
from pathlib import Path
from typing import Any

import yaml

MOST_BYTES = 64 << 20
MOST_VALUES = 1_000_000
"""Of a tree, each alias counted as what it stands for."""


class TreeError(ValueError):
    """A text that is no tree of values; the message says why, in a few words."""


def yaml_of(path: Path) -> Any:
    """The content of a yaml file in UTF-8. Raises TreeError; errors of the system are passed on."""
    return from_yaml(_text(path))


def json_of(path: Path) -> Any:
    """The content of a json file, with or without a byte order mark. Raises TreeError, and errors of the system."""
    try:
        return json.loads(_text(path))
    except RecursionError:
        raise TreeError("nested too deeply") from None
    except ValueError as error:
        raise TreeError(_short(error)) from None


def from_yaml(text: str) -> Any:
    """The values of a yaml text; tags that would call code are refused. Raises TreeError."""
    try:
        tree = yaml.safe_load(text)
        count(tree)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise TreeError(_short(error) if mark is None else f"line {mark.line + 1}") from None
    except RecursionError:
        raise TreeError("nested too deeply") from None
    except TreeError:
        raise
    except ValueError as error:  # dates that are none, numbers too long to be read
        raise TreeError(_short(error)) from None
    return tree


def glued(tree: Any) -> str | None:
    """The first name in a tree that holds a colon and has no value: `a:1` where `a: 1` was meant."""
    if isinstance(tree, dict):
        own = (str(name) for name, value in tree.items() if value is None and ":" in str(name))
        return next(own, None) or glued(list(tree.values()))
    found = (glued(value) for value in (tree if isinstance(tree, list) else ()))
    return next((name for name in found if name is not None), None)


def depth(text: str) -> int:
    """How deep brackets of a text lie in each other; the yaml reader takes minutes for thousands."""
    deepest = level = 0
    for character in text:
        level += (character in "[{") - (character in "]}")
        deepest = max(deepest, level)
    return deepest


def count(tree: Any) -> int:
    """The number of values of a tree. Raises TreeError where aliases make it endless, or larger than MOST_VALUES."""
    known: dict[int, int | None] = {}

    def size(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        if id(value) in known:
            if known[id(value)] is None:
                raise TreeError("an alias stands inside of what it stands for")
            return known[id(value)] or 0
        known[id(value)] = None
        inside = value.values() if isinstance(value, dict) else value
        found = known[id(value)] = 1 + sum(map(size, inside))
        if found > MOST_VALUES:
            raise TreeError(f"aliases make more than {MOST_VALUES} values of it")
        return found

    return size(tree)


def _text(path: Path) -> str:
    if path.stat().st_size > MOST_BYTES:
        raise TreeError(f"larger than {MOST_BYTES >> 20} MB")
    raw = path.read_bytes()
    marks = (b"\xff\xfe", b"\xfe\xff")
    try:
        return raw.decode("utf-16" if raw.startswith(marks) else "utf-8-sig")
    except UnicodeDecodeError:
        raise TreeError("not text in UTF-8") from None


def _short(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
