"""Figures of methods that name objects and teach a segmenter their names."""

from docs.figures.drawing import Grid
from docs.figures.runs import staged, trained, untrained
from docs.figures.shared import of_stage

QUICK = ("data.train_count=200",)


def comus() -> Grid:
    """Objects, the names of those at a core, and what the second round learns."""
    return of_rounds("comus")


def maskdistill() -> Grid:
    """Objects, their names, and what a second round would learn."""
    return of_rounds("maskdistill", "phases=[{share: 2}, {share: 1, method.round: 2}]")


def of_rounds(method: str, *words: str) -> Grid:
    """Objects, what the first round learns and what the second one learns, of training pictures."""
    first = untrained(method, *QUICK, *words)
    found = first.model.shown(staged(first))
    second = trained(method, *QUICK, *words)
    views = {"objects": found["objects"], "round 1\nlearns": found["pseudo-labels"]}
    views["round 2\nlearns"] = second.model.labels(staged(second))
    count = first.cfg.method.num_clusters
    return of_stage(first, views, {name: count for name in views if name != "objects"})
