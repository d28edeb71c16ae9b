"""`run.py compare`: methods side by side over seeds. Trains what is missing, takes what is there, writes the report.

`methods="a b" seeds="0 1 2" data=… key=value …`, or `runs="runs/a runs/b"`, or both. `a:key=value` is a word for method
`a` alone. A finished run of the same configuration below `run.dir` is taken as it is, whoever trained it; the others
are trained one after the other. The same command goes on where it was stopped. `part=i/n`: one share of a job array.
`eval="evaluation.crf=dense"` scores all of them anew from their checkpoints, once, in place of training them again;
`checkpoint=best` those of the best step, in place of the last.
`published=cocostuff27` puts what publications report on a data set below, in tables of its own.
"""

import csv
import hashlib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import config
from common.errors import LabelfreeError
from common.files import write_text
from datamodules.folder import expect_apart
from engine.records import recipes, run_folder
from engine.records.identity import SAME_RUN, mark
from engine.setup import UNLABELLED_CLUSTERS
from inspection import galleries
from launch import finished as finished_runs
from launch.asked import read
from launch.finished import read_run
from launch.trials import Queue, Trial, part_of
from reporting import comparison, comparison_page, comparison_screen, comparison_tables
from reporting.comparison import Finished, Section
from reporting.published import Cited

log = logging.getLogger("labelfree.compare")


class Comparison(Queue):
    """The trainings of a comparison, and the folders that it takes as they are."""

    def __init__(self, named: dict[str, str]) -> None:
        asked = read(named)
        self.request = asked
        words, methods, seeds, folders, parent = asked.words, asked.methods, asked.seeds, asked.folders, asked.parent
        told = (sorted(words.items()), methods, seeds, folders, *[sorted(asked.anew)] * bool(asked.anew))
        own_mark = hashlib.sha256(repr(told).encode()).hexdigest()[:6]
        title = named.get("name") or f"{'+'.join(methods)[:60] or 'runs'}-{own_mark}"
        super().__init__("comparison", parent / "compare" / title, [], None)
        self.given = [Path(folder) for folder in folders]
        for folder in self.given:  # what cannot be compared ends before the first training
            finished_runs.expect_words(read_run(folder), asked.scoring)
        finished = Stored(parent, self.given)
        for method in methods:
            own = asked.words_of(method)
            for seed in dict.fromkeys(seeds):
                self.trials.append(trial(len(self.trials), method, seed, own, parent, finished))

    def finished(self) -> list[Finished]:
        """All runs that are there: the given ones first, each once."""
        for item in self.trials:
            item.look(self.target)
        done = [item.folder for item in self.trials if item.state == "finished"]
        return [read_run(folder) for folder in dict.fromkeys(path.resolve() for path in [*self.given, *done])]

    def scored(self, runs: list[Finished]) -> tuple[list[Finished], list[str]]:
        """The runs with the scores that were asked for anew, and a line for each that could not be scored."""
        found, failed = [], []
        for run in runs if self.request.anew else ():
            try:
                found.append(finished_runs.scored_anew(run, self.request.scoring, self.request.checkpoint))
            except LabelfreeError as error:
                failed.append(f"{run.metrics['method']}, seed {run.metrics['seed']}, {run.shown}: {error}")
        return (found, failed) if self.request.anew else (runs, [])

    def missing(self) -> list[str]:
        """A line for every training that is not finished."""
        return [
            f"{item.values['method']}, seed {item.values['seed']}: {item.note or item.state}"
            for item in self.trials
            if item.state != "finished"
        ]


def trial(index: int, method: str, seed: int, words: dict[str, str], parent: Path, finished: "Stored") -> Trial:
    """One training; its folder is that of a finished run of the same configuration, where there is one."""
    own = [f"{key}={value}" for key, value in words.items() if key != "run.dir"]
    cfg = config.compose([f"method={method}", f"seed={seed}", *own])  # a wrong word ends before the first training
    if not index:
        expect_apart(cfg, **{"run.dir": parent})
    name = f"{method}-{cfg.data.name}-{cfg.backbone.name}-{mark(cfg)}-seed{seed}"
    run_words = [f"method={method}", f"seed={seed}", *own, f"run.dir={parent}", f"run.name={name}"]
    found = finished.equal(config.plain(cfg))
    if found is not None:
        log.info("%s, seed %d: %s is taken as it is", method, seed, found)
    return Trial(index, {"method": method, "seed": seed}, run_words, found or parent / name)


class Stored:
    """Given finished runs and those directly below a folder, by their configurations."""

    def __init__(self, parent: Path, given: list[Path]) -> None:
        paths = sorted(path.parent for path in parent.glob("*/metrics.json") if (path.parent / "config.yaml").is_file())
        self.folders = [*given, *(path for path in paths if not path.is_symlink())]
        self.read: dict[Path, dict[str, Any]] = {}

    def equal(self, wanted: dict[str, Any]) -> Path | None:
        """The folder of a run that this configuration would train again; None without.

        A run stores the number of clusters that it had, also where it followed from the classes.
        """
        natural = wanted["method"]["num_clusters"] is None
        ignore = (*SAME_RUN, *(["method.num_clusters"] if natural else []))
        for folder in self.folders:
            stored = self.read.setdefault(folder, run_folder.read_yaml(folder / "config.yaml"))
            if any(stored.get(group, {}).get("name") != wanted[group]["name"] for group in config.GROUPS):
                continue
            if stored.get("seed") != wanted["seed"]:
                continue
            if natural and stored["method"]["num_clusters"] != classes_of(folder):
                continue
            if config.first_difference(config.with_defaults(stored), wanted, ignore) is None:
                return folder
        return None


def classes_of(folder: Path) -> int:
    """How many classes the data of a finished run has, or the clusters that are taken where there are no labels."""
    table = folder / "classes.csv"
    if not table.is_file():
        return UNLABELLED_CLUSTERS
    with table.open(newline="") as handle:
        return sum(1 for _ in csv.DictReader(handle))


def report(
    folder: Path, title: str, runs: list[Finished], missing: list[str], cited: Sequence[Cited] = ()
) -> list[Section]:
    """Write table.md, table.tex, table.csv and index.html into `folder`. A training that is there twice counts once.

    `cited`: published rows, which stand below in tables of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs, twice = comparison.once(runs)
    for line in twice:
        log.warning("%s", line)
    sections = comparison.arrange(runs)
    for section in sections:
        for entry in section.entries:
            found = [recipes.published_recipe(run.config) for run in entry.runs]
            if found[0] is not None and len(set(found)) == 1:
                entry.published, entry.source = recipes.figures(found[0])
    write_text(folder / "table.md", comparison_tables.markdown(sections, title, cited))
    write_text(folder / "table.tex", comparison_tables.latex(sections, title, cited))
    write_text(folder / "table.csv", comparison_tables.as_csv(sections, cited))
    shown = [galleries.gallery(section) for section in sections]
    write_text(folder / "index.html", comparison_page.render(title, sections, shown, missing, twice, cited))
    return sections


def main(words: list[str]) -> int:
    """Compare; 0: done, 1: a training failed, another one: that of a training which was asked to stop."""
    from engine import setup

    named = config.parse_words(words)
    part = named.get("part")
    first, parts = part_of(part)
    setup.begin()
    queue = Comparison(named)
    code = queue.run(first, parts) if queue.trials else 0
    if code not in (0, 1):
        return code
    runs, missing = queue.finished(), queue.missing()
    if part and missing:
        print(f"{len(missing)} trainings are not finished yet; the share that ends last writes the report")
        return code
    runs, failed = queue.scored(runs)
    for line in failed:
        log.warning("not scored: %s", line)
    code, missing = code or int(bool(failed)), [*missing, *failed]
    if failed and not runs:
        raise LabelfreeError(f"compare: no run could be scored anew; first: {failed[0]}")
    if not runs:
        raise LabelfreeError(f"compare: no training ended, so there is nothing to compare; first: {missing[0]}")
    title = named.get("name") or ", ".join(dict.fromkeys(run.metrics["method"] for run in runs))
    title += f" ({' '.join(queue.request.anew)})" if queue.request.anew else ""
    sections = report(queue.folder, f"Comparison: {title}", runs, missing, queue.request.cited)
    if sys.stdout.isatty():  # rows of markdown are wider than a terminal
        for part in comparison_screen.lines(sections):
            Console().print(part)
    else:
        sys.stdout.write(comparison_tables.markdown(sections, f"Comparison: {title}", queue.request.cited))
    print(f"\n{queue.folder / 'index.html'}; table.md, table.tex and table.csv are beside it")
    return code
