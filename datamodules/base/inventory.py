"""`run.py data`: what a data set consists of, where it comes from, and what of it is there."""

import sys
from collections.abc import Iterator

from omegaconf import DictConfig

from common.errors import DataError
from datamodules.base.module import SegmentationDataModule, available, load_datamodule
from datamodules.base.official import OfficialDataModule


def names() -> Iterator[str]:
    """A line for each data set."""
    for name in available():
        yield f"{name:<14} {_title(load_datamodule(name))}"


def _title(kind: type[SegmentationDataModule]) -> str:
    if issubclass(kind, OfficialDataModule):
        return kind.facts.title
    return (sys.modules[kind.__module__].__doc__ or "").strip().split("\n")[0]


def describe(cfg: DictConfig) -> Iterator[str]:
    """What to fetch, from where, under which terms, and the layout that is read."""
    kind = load_datamodule(cfg.data.name)
    yield f"{cfg.data.name}: {_title(kind)}"
    if not issubclass(kind, OfficialDataModule):
        return
    facts = kind.facts
    yield f"home     {facts.home}"
    yield f"terms    {facts.terms}"
    for text in facts.downloads:
        yield f"fetch    {text}"
    for text in facts.notes:
        yield f"note     {text}"


def examine(cfg: DictConfig, rebuild: bool = False) -> Iterator[str]:
    """A line for each part: ok or missing. Without a folder: what it has to hold. Raises DataError at the end
    where something is missing, or at once where there is no such folder.
    """
    module = load_datamodule(cfg.data.name)(cfg)
    if not isinstance(module, OfficialDataModule):
        module.setup()
        for split in ("train", "val"):
            yield f"ok       {module.describe(split)}"
        return
    if not cfg.data.root:
        for part in module.parts().values():
            yield f"expects  {part.wanted}"
        yield f"nothing was checked; `run.py data name={cfg.data.name} root=<folder>` checks a folder"
        return
    yield f"checking {module.base}"
    results = []
    for check in module.checks(rebuild):
        results.append(check.ok)
        remedy = "" if check.ok else f" -> {check.remedy}"
        yield f"{'ok' if check.ok else 'missing':<8} {check.what}: {check.found}{remedy}"
    if not all(results):
        raise DataError(
            f"data.root={cfg.data.root}: {results.count(False)} of {len(results)} checks failed; what to do stands "
            "behind each"
        )
