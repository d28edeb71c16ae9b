"""Everything that a run imports: the server of processes.py has it before it forks.

Only imports stand here: a process that has computed something, or has threads, is not one to fork.
"""

from importlib import import_module

from lightning_modules import registry

MODULES = (
    "tests.conftest", "tests.support.processes", "tests.support.ranks", "run", "launch.sweep", "launch.compare",
    "inference.predicting", "torchmetrics.classification",
)  # fmt: skip

LOADED = [import_module(name) for name in MODULES]
METHODS = [registry.method_class(name) for name in registry.names()]
