"""Finds methods by their files: `<name>.py`, `<name>/module.py` or `<folder>/<name>.py` here, beside their yaml."""

import importlib

import config
from common import about
from common.errors import ConfigError, did_you_mean
from lightning_modules import facts
from lightning_modules.base import UnsupervisedSegmenter


def names() -> list[str]:
    """All methods, in alphabetical order."""
    return config.names("method")


def method_class(name: str) -> type[UnsupervisedSegmenter]:
    """The one UnsupervisedSegmenter that the method's file defines.

    Raises ConfigError for an unknown name, and where the file defines none or several.
    """
    if name not in names():
        raise ConfigError(f"method={name}: no such method; {did_you_mean(name, names())}")
    module = importlib.import_module(about.module_of("lightning_modules", name))
    found = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, UnsupervisedSegmenter) and item.__module__ == module.__name__
    ]
    facts.expect_one(name, len(found))
    return found[0]
