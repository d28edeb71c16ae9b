"""The pages name every backbone that there is, and every one that needs a file."""

import re

import config
from docs import recipes

DOCS = recipes.PAGE.parent


def named(text: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9_]+)`", text))


def test_the_list_of_backbones_is_whole():
    text = (DOCS / "backbones.md").read_text(encoding="utf-8")
    listed = text.partition("## The list")[2].partition("\n## ")[0]
    assert set(config.names("backbone")) <= named(listed)
    assert set(config.names("backbone")) <= named((DOCS.parent / "README.md").read_text(encoding="utf-8"))


def test_weights_that_come_from_a_file_are_named():
    text = (DOCS / "weights.md").read_text(encoding="utf-8")
    line = re.search(r"^- A file is needed by (.*?)\. ", text, re.M | re.S)[1]
    needed = {name for name in config.names("backbone") if config.load_group("backbone", name)["weights"] is None}
    assert named(line) == needed
