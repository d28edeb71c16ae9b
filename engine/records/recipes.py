"""Is a run the published recipe? Then, and only then, the published figure stands beside its own."""

from functools import cache
from typing import Any

import config

NO_MATTER = (
    "seed", "run.", "wandb.", "logger", "cache.", "predict.", "search.", "data.root", "data.lists", "data.workers",
    "data.cache", "data.max_broken", "data.eval_batch_size", "backbone.weights", "backbone.acknowledge_licence",
    "backbone.cache_features", "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy",
    "trainer.threads", "trainer.progress", "trainer.log_every", "trainer.val_every", "trainer.checkpoint_every",
    "evaluation.panels", "evaluation.kmeans.", "evaluation.posthoc.", "evaluation.retrieval.", "evaluation.resolutions",
    "explain.",
)  # fmt: skip
"""Keys that may differ from the recipe: where it ran, what was computed beside it."""

BESIDE = {
    "evaluation.overcluster.": ("evaluation.overcluster.k", "evaluation.cbfe.clusters"),
    "evaluation.cbfe.": ("evaluation.cbfe.clusters",),
    "evaluation.fcn.": ("evaluation.fcn.epochs",),
    "evaluation.communities.": ("evaluation.communities.clusters",),
}
"""Keys of read-outs, and the keys that ask for these: they may differ where the recipe does not."""


def published_recipe(settings: dict[str, Any]) -> str | None:
    """The experiment with published figures whose settings (flat) a run has; None where none has all of them."""
    own = {group: settings.get(f"{group}.name") for group in config.GROUPS}
    for name in config.names("experiment"):
        words = config.load_group("experiment", name)["words"]
        if any(words[group] != own[group] for group in config.GROUPS) or not config.published(name):
            continue
        recipe = _flat(name)
        if all(
            settings.get(key) == value
            for key, value in recipe.items()
            if matters(key, recipe) and (key, value) != ("method.num_clusters", None)
        ):
            return name
    return None


def matters(key: str, recipe: dict[str, Any]) -> bool:
    """Whether a run of the recipe (flat) has to agree with it in this key."""
    for start, wanted in BESIDE.items():
        if key.startswith(start):
            return any(recipe[name] for name in wanted)
    return not key.startswith(NO_MATTER)


def figures(name: str) -> tuple[dict[str, float], str]:
    """(`<probe>/<metric>` -> percent, source) of an experiment."""
    return config.published(name), config.load_group("experiment", name)["figure"]["source"]


def published_figures(settings: dict[str, Any]) -> dict[str, Any]:
    """`published/<probe>/<metric>` and `published/source` of the recipe that a run is, by its settings (flat)."""
    name = published_recipe(settings)
    if name is None:
        return {}
    found, source = figures(name)
    return {f"published/{key}": value for key, value in found.items()} | {"published/source": source}


@cache
def _flat(name: str) -> dict[str, Any]:
    return config.flatten(config.compose([f"experiment={name}"]))
