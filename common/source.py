"""What this project's modules declare, read from their source: nothing is imported for it, and with it no torch."""

import ast
from collections.abc import Iterator
from functools import cache

from common import about
from common.errors import ConfigError


@cache
def tree(module: str) -> ast.Module:
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
    return (ast.get_docstring(tree(module)) or "").partition("\n")[0]


def find(module: str, name: ast.expr | str) -> tuple[str, ast.ClassDef] | None:
    """The class that a name (or `module.name`) means in a module, through imports from this project; else None."""
    if isinstance(name, ast.Attribute):
        place = modules(module).get(ast.unparse(name.value))
        return None if place is None else find(place, name.attr)
    name = name.id if isinstance(name, ast.Name) else name
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return module, node
        if isinstance(node, ast.ImportFrom) and of_project(node.module):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find(node.module, alias.name)
    return None


def modules(module: str) -> dict[str, str]:
    """The modules of this project that a module imports, by the names that it knows them by."""
    found = {}
    for node in tree(module).body:
        if isinstance(node, ast.ImportFrom) and of_project(node.module):
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        if isinstance(node, ast.Import):
            names = (alias for alias in node.names if of_project(alias.name))
            found |= {alias.asname or alias.name: alias.name for alias in names}
    return found


def lineage(module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
    """A class and those it inherits from, the nearest first, as far as they are of this project."""
    yield module, node
    for base in node.bases:
        found = find(module, base)
        if found is not None:
            yield from lineage(*found)


def of_project(module: str | None) -> bool:
    """Whether a module belongs to a room of this project."""
    return bool(module) and (about.ROOT / module.partition(".")[0]).is_dir()


def value(node: ast.ClassDef, key: str) -> ast.expr | None:
    """What the body of a class assigns to a name."""
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == key for target in targets) and statement.value:
            return statement.value
    return None


@cache
def stored(node: ast.ClassDef) -> set[str]:
    """Everything that a class assigns to, as it is written; walked once, because each fact of each heir asks for it."""
    return {ast.unparse(item) for item in ast.walk(node) if isinstance(getattr(item, "ctx", None), ast.Store)}
