"""What methods say of themselves, read from their source: no method is imported for it, and with it no torch."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import config
from common import about
from common.errors import ConfigError, did_you_mean

BASE = "UnsupervisedSegmenter"


@dataclass(frozen=True)
class Facts:
    """Declared facts of a method; see `lightning_modules.base.UnsupervisedSegmenter`. None: it depends on settings."""

    summary: str
    """The first line of its file."""
    title: str
    headline: str
    uses_labels: bool | None
    trains: bool | None

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
    found = [node.name for node in source(module).body if isinstance(node, ast.ClassDef) and is_method(module, node)]
    expect_one(name, len(found))
    values = {key: declared(module, found[0], key) for key in ("title", "headline", "uses_labels", "trains")}
    return Facts(summary=summary(module), **values)


def expect_one(name: str, found: int) -> None:
    """Raises ConfigError where a method's file does not define exactly one method."""
    if found != 1:
        raise ConfigError(
            f"method={name}: lightning_modules/{name}.py must define exactly one UnsupervisedSegmenter, found {found}"
        )


@cache
def source(module: str) -> ast.Module:
    """The syntax tree of a module of this project. Raises ConfigError where there is none, or no Python in it."""
    path = about.ROOT / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"no Python: {error}"
        raise ConfigError(f"{path.relative_to(about.ROOT)}: cannot be read ({reason})") from None


def summary(module: str) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(source(module)) or "").partition("\n")[0]


def find(module: str, name: ast.expr | str) -> tuple[str, ast.ClassDef] | None:
    """The class that a name (or `module.name`) means in a module, through imports from this project; else None."""
    if isinstance(name, ast.Attribute):
        place = modules(module).get(ast.unparse(name.value))
        return None if place is None else find(place, name.attr)
    name = name.id if isinstance(name, ast.Name) else name
    for node in source(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_modules."):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name)
    return None


def modules(module: str) -> dict[str, str]:
    """The modules of methods that a module imports, by the names that it knows them by."""
    found = {}
    for node in source(module).body:
        if isinstance(node, ast.ImportFrom) and node.module == "lightning_modules":
            found |= {alias.asname or alias.name: f"lightning_modules.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names = (alias for alias in node.names if alias.name.startswith("lightning_modules."))
            found |= {alias.asname or alias.name: alias.name for alias in names}
    return found


def lineage(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and those it inherits from, the nearest first, as far as they are of this project."""
    yield module, node
    for base in node.bases:
        found = find(module, base)
        if found is not None:
            yield from lineage(*found)


def is_method(module: str, node: ast.ClassDef) -> bool:
    return any(item.name == BASE for _, item in lineage(module, node))


def declared(module: str, name: str, key: str) -> Any:
    """The value of a class attribute; None where a property gives it, or the class itself sets it by its settings.

    As in the base, a class that defines `scores` has `own` for its headline unless it says otherwise.
    """
    for _, node in lineage(*find(module, name)):
        if f"self.{key}" in stored(node):
            return None
        for statement in node.body:
            if isinstance(statement, ast.FunctionDef) and statement.name == key:
                return None
            targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == key for target in targets) and statement.value:
                return ast.literal_eval(statement.value)
        if key == "headline" and any(isinstance(item, ast.FunctionDef) and item.name == "scores" for item in node.body):
            return "own"
    return None


@cache
def stored(node: ast.ClassDef) -> set[str]:
    """Everything that a class assigns to, as it is written; walked once, because each fact of each heir asks for it."""
    return {ast.unparse(item) for item in ast.walk(node) if isinstance(getattr(item, "ctx", None), ast.Store)}
