"""What methods say of themselves, read from their source: no method is imported for it, and with it no torch."""

import ast
from dataclasses import dataclass
from typing import Any

import config
from common import about, source
from common.errors import ConfigError, did_you_mean

BASE, STAGED = "UnsupervisedSegmenter", "StagedSegmenter"
OWN = ("scores", "prototypes", "classify")
"""What a method with classes of its own writes: one of them."""


@dataclass(frozen=True)
class Facts:
    """Declared facts of a method; see `lightning_modules.base.UnsupervisedSegmenter`. None: it depends on settings."""

    summary: str
    """The first line of its file."""
    title: str
    headline: str
    uses_labels: bool | None
    trains: bool | None
    staged: bool
    """Whether it has an offline stage, which `run.py pseudo` runs alone."""

    @property
    def remark(self) -> str:
        """What a list has to say of it beside its summary; often nothing."""
        said = ["uses labels"] if self.uses_labels else []
        return ", ".join(said + (["trains nothing"] if self.trains is False else []))


def facts(name: str) -> Facts:
    """The facts of a method. Raises ConfigError for an unknown name, or where its file does not define one method."""
    if name not in config.names("method"):
        raise ConfigError(f"method={name}: no such method; {did_you_mean(name, config.names('method'))}")
    module = about.module_of("lightning_modules", name)
    nodes = [node for node in source.tree(module).body if isinstance(node, ast.ClassDef)]
    found = [node for node in nodes if inherits(module, node, BASE)]
    expect_one(name, len(found))
    values = {key: declared(module, found[0].name, key) for key in ("title", "headline", "uses_labels", "trains")}
    return Facts(summary=source.summary(module), **values, staged=inherits(module, found[0], STAGED))


def expect_one(name: str, found: int) -> None:
    """Raises ConfigError where a method's file does not define exactly one method."""
    if found != 1:
        raise ConfigError(
            f"method={name}: lightning_modules/{name}.py must define exactly one UnsupervisedSegmenter, found {found}"
        )


def inherits(module: str, node: ast.ClassDef, base: str) -> bool:
    """Whether a class is `base`, or one of its heirs."""
    return any(item.name == base for _, item in source.lineage(module, node))


def declared(module: str, name: str, key: str) -> Any:
    """The value of a class attribute; None where a property gives it, or the class itself sets it by its settings.

    As in the base, a class that defines `scores` or `prototypes` has `own` for its headline unless it says otherwise.
    """
    for _, node in source.lineage(*source.find(module, name)):
        methods = {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
        if f"self.{key}" in source.stored(node) or key in methods:
            return None
        value = source.value(node, key)
        if value is not None:
            return ast.literal_eval(value)
        if key == "headline" and methods.intersection(OWN):
            return "own"
    return None
