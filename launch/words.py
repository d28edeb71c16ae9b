"""Words of a command: what is needed, what may be left out, and whether a checkpoint knows them. Imports no torch."""

import os
import re
from pathlib import Path

import yaml

import config
from common.errors import ConfigError
from common.files import expect_checkpoint
from datamodules.facts import expect_root


def take(words: list[str], *names: str) -> tuple[dict[str, str], list[str]]:
    """Split `names` off a list of key=value words; raises ConfigError where one of them is missing."""
    config.parse_words(words)
    found = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    for name in names:
        if not found.get(name):
            raise ConfigError(f"{name}: is needed; write {name}=… ({name.upper()}=… of make)")
    rest = [word for word in words if word.partition("=")[0] not in names]
    return {name: found[name] for name in names}, rest


def option(words: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take one key=value word that may be absent off a list: (its value or None, the other words)."""
    found = [word.partition("=")[2] for word in words if word.partition("=")[0] == name]
    return found[-1] if found else None, [word for word in words if word.partition("=")[0] != name]


def of_checkpoint(
    words: list[str], *needed: str, optional: tuple[str, ...] = ()
) -> tuple[dict[str, str | None], list[str]]:
    """The words of a command that works with a checkpoint: (its own, None where they are left out; the others).

    Raises LabelfreeError where one is missing, there is no such file, or its configuration does not know a word.
    """
    named, rest = take(words, *needed)
    found: dict[str, str | None] = dict(named)
    for name in optional:
        found[name], rest = option(rest, name)
    expect_words(Path(named["ckpt"]), rest)
    return found, rest


def whole_number(name: str, text: str, meaning: str) -> int:
    """A word's value as a number from 1 on. Raises ConfigError."""
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise ConfigError(f"{name}={text}: expected a whole number, {meaning}")
    return int(text)


def at_home(word: str) -> str:
    """`key=~/pictures` with the user's home folder in it; shells put it in at the beginning of a word alone."""
    key, equals, value = word.partition("=")
    return f"{key}={os.path.expanduser(value)}" if equals and value.startswith("~/") else word


def expect_words(checkpoint: Path, words: list[str]) -> None:
    """Looks at words for a checkpoint before it is read, as far as the configuration of its run folder can tell.

    Raises CheckpointError without the file, and as `expect_fitting`.
    """
    expect_checkpoint(checkpoint)
    expect_fitting(checkpoint.parent.parent / "config.yaml", words)


def expect_fitting(stored: Path, words: list[str]) -> None:
    """Looks at words for the run of a configuration file; a file that is none of ours is left to those who read it.

    Raises ConfigError for a key that the configuration lacks or that a checkpoint keeps, and for a wrong value,
    DataError for a folder that is not there.
    """
    try:
        tree = yaml.safe_load(stored.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return
    if not isinstance(tree, dict) or not all(isinstance(tree.get(group), dict) for group in config.GROUPS):
        return
    groups = [str(tree[group].get("name")) for group in config.GROUPS]
    if any(name not in config.names(group) for group, name in zip(config.GROUPS, groups, strict=True)):
        return
    known = config.Known(config.flatten(config.current(tree)), config.rules(*groups))
    given = {}
    for key, raw in config.parse_words(words).items():
        config.expect_changeable(key, raw, known)
        given[key] = config.checked(key, config.parse_value(key, raw, known), known)
    folders = {key: given[f"data.{key}"] for key in ("root", "train_roots") if f"data.{key}" in given}
    expect_root(tree["data"]["name"], folders)
