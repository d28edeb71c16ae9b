"""`run.py data`: what a data set consists of, where it comes from, and what of it is there."""

from collections.abc import Iterator

from omegaconf import DictConfig

from common.errors import DataError
from datamodules import facts
from datamodules.facts import Facts


def names() -> Iterator[str]:
    """A line for each data set."""
    for name in facts.available():
        yield f"{name:<14} {title(name)}"


def title(name: str) -> str:
    """A published data set as its release calls it, another one as the first line of its file says."""
    known = facts_of(name)
    return facts.summary(name) if known is None else known.title


def facts_of(name: str) -> Facts | None:
    """`facts.facts`; asks the class where its source does not tell, which imports torch."""
    try:
        return facts.facts(name)
    except ValueError:
        from datamodules.base.module import load_datamodule

        return load_datamodule(name).facts


def describe(cfg: DictConfig) -> Iterator[str]:
    """What to fetch, from where, under which terms."""
    yield f"{cfg.data.name}: {title(cfg.data.name)}"
    known = facts_of(cfg.data.name)
    if known is None:
        return
    yield f"home     {known.home}"
    yield f"terms    {known.terms}"
    for text in known.downloads:
        yield f"fetch    {text}"
    for text in known.notes:
        yield f"note     {text}"


def examine(cfg: DictConfig, rebuild: bool = False) -> Iterator[str]:
    """A line for each part: ok or missing. Without a folder: what it has to hold. Raises DataError at the end
    where something is missing, or at once where there is no such folder.
    """
    from datamodules.base.module import load_datamodule  # imports torch, which `describe` does without
    from datamodules.base.official import OfficialDataModule

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
