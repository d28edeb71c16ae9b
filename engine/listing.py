"""`run.py list`: what can be chosen, and what one choice is, takes and has been published with."""

import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator

import config
from common.errors import ConfigError, did_you_mean
from common.formats.commented import commented, heading
from lightning_modules.facts import facts

GROUPS = ("method", "data", "backbone", "trainer")


def listing(words: Iterable[str]) -> Iterator[str]:
    """Lines about everything, or about what `method=… data=… backbone=… trainer=… experiment=…` name.

    Raises ConfigError for other words and for unknown names.
    """
    chosen = config.parse_words(words)
    for key, name in chosen.items():
        if key not in config.WORDS:
            raise ConfigError(f"{key}={name}: list takes {', '.join(config.WORDS)}; {did_you_mean(key, config.WORDS)}")
        if name not in config.names(key):
            raise ConfigError(f"{key}={name}: no such {key}; {did_you_mean(name, config.names(key))}")
    yield from chosen_lines(chosen) if chosen else all_lines()


def all_lines() -> Iterator[str]:
    """Every name there is."""
    methods = config.names("method")
    width = max(map(len, methods))
    for number, name in enumerate(methods):
        found = facts(name)
        text = found.summary + (f" ({found.remark})" if found.remark else "")
        yield from wrapped(f"{'' if number else 'method':<11} {name:<{width}}  ", text)
    for group in GROUPS[1:]:
        yield from wrapped(f"{group:<11} ", ", ".join(config.names(group)) or "-")
    for name in config.names("experiment"):
        yield from recipe(name)


def recipe(name: str) -> Iterator[str]:
    """A published setting and the figure to reach."""
    yield f"experiment  {name}"
    yield from wrapped(" " * 12, config.figure(name))


def chosen_lines(chosen: dict[str, str]) -> Iterator[str]:
    """What each named member is; the recipes that have all of them; what the members take."""
    for group, name in chosen.items():
        yield from wrapped(f"{group:<11} ", f"{name}: {about(group, name)}")
    if "method" in chosen:
        yield from method_lines(chosen["method"])
    recipes = [name for name in config.names("experiment") if matches(name, chosen)]
    for name in recipes:
        yield from recipe(name)
    if not recipes:
        yield "experiment  no recipe has " + " and ".join(f"{group}={name}" for group, name in chosen.items())
    for group, name in chosen.items():
        if group in config.GROUPS:
            yield f"takes       besides the keys of every run (run.py show-config {group}={name}):"
            yield from keys(group, name)


def about(group: str, name: str) -> str:
    return facts(name).summary if group == "method" else heading(config.CONFIGS / group / f"{name}.yaml")


def method_lines(name: str) -> Iterator[str]:
    """Its score, what it reads and trains, its sweeps."""
    found = facts(name)
    labels = {True: "reads labels", False: "reads no labels", None: "may read labels"}[found.uses_labels]
    trains = {True: "is trained", False: "trains nothing but the probes", None: "is trained or not, as it is set"}
    yield f"            its score is val/{found.headline}/*; it {labels} and {trains[found.trains]}"
    sweeps = [sweep for sweep in config.names("sweep") if f"method={name}," in sweep_command(sweep)]
    if sweeps:
        yield f"sweep       {', '.join(sweeps)}"


def sweep_command(name: str) -> str:
    """The words of a sweep file's command, each with a comma behind it."""
    return "".join(f"{word}," for word in config.load_group("sweep", name).get("command", []))


def matches(experiment: str, chosen: dict[str, str]) -> bool:
    """True of a recipe that names all of the chosen members."""
    words = {**config.load_group("experiment", experiment)["words"], "experiment": experiment}
    return all(words.get(group) == name for group, name in chosen.items())


def keys(group: str, name: str) -> Iterator[str]:
    """Its keys with their values and meanings."""
    prefix = "" if group == "method" else f"{group}."
    for key, (value, comment) in commented(config.CONFIGS / group / f"{name}.yaml").items():
        if key not in ("method.name", "name") and not key.startswith("rules."):
            yield from wrapped(f"  {f'{prefix}{key}={value}':<38}  ", comment)


def wrapped(lead: str, text: str) -> list[str]:
    """A lead and a text, the text broken below itself where a terminal is narrower."""
    if not text:
        return [lead.rstrip()]
    if not sys.stdout.isatty():
        return [lead + text]
    indent = min(len(lead), 40)
    columns = max(60, shutil.get_terminal_size().columns)
    return textwrap.wrap(lead + text, columns, subsequent_indent=" " * indent, break_long_words=False)
