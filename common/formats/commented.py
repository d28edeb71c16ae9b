"""Keys of a yaml file with the words that stand behind them: what the configuration says of itself."""

from pathlib import Path

import yaml


def commented(path: Path) -> dict[str, tuple[str, str]]:
    """{dotted key: (its value as written, the comment behind it)} of a yaml mapping, in the order of the file."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    found: dict[str, tuple[str, str]] = {}

    def walk(node: yaml.Node, prefix: str) -> None:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, f"{name}.")
                continue
            rest = lines[value.end_mark.line][value.end_mark.column :] if value.end_mark.line < len(lines) else ""
            found[name] = text[value.start_mark.index : value.end_mark.index].strip(), rest.partition("#")[2].strip()

    root = yaml.compose(text, Loader=yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader)
    if root is not None:
        walk(root, "")
    return found


def heading(path: Path) -> str:
    """The comment that a yaml file begins with, as one line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    head = lines[: next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))]
    return " ".join(line.lstrip("# ") for line in head)
