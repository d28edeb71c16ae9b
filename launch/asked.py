"""What a comparison is asked for, read and checked before anything heavy is imported: a wrong word answers at once."""

import re
from dataclasses import dataclass
from pathlib import Path

import config
from common.errors import ConfigError
from engine import ahead
from launch.submit import count
from launch.trials import part_of
from launch.words import expect_fitting
from reporting import published

OWN_WORDS = ("methods", "runs", "seeds", "name", "part", "eval", "checkpoint", "published")
CHECKPOINTS = ("last", "best")
ANEW = ("evaluation.", "data.", "trainer.", "search.")
"""Beginnings of the keys that finished runs may be scored anew with."""


@dataclass(frozen=True)
class Asked:
    """Methods to train on the same words, each with all seeds, and folders of finished runs."""

    methods: list[str]
    seeds: list[int]
    folders: list[str]
    words: dict[str, str]
    """Those of the trainings, with `a:key` for method `a` alone."""
    cited: list[published.Cited]
    """Published rows that stand below the measured ones."""
    scoring: list[str]
    """Words that finished runs are scored anew with."""
    checkpoint: str | None
    """Which of their checkpoints is scored anew; None: the one that their scores are of."""

    @property
    def anew(self) -> list[str]:
        """The words that say how finished runs are scored anew; none where they are taken as they are."""
        return self.scoring + ([f"checkpoint={self.checkpoint}"] if self.checkpoint else [])

    @property
    def parent(self) -> Path:
        return Path(self.words.get("run.dir", "runs"))

    def words_of(self, method: str) -> dict[str, str]:
        """The words of one method's trainings."""
        shared = {key: value for key, value in self.words.items() if ":" not in key}
        own = f"{method}:"
        return shared | {key.removeprefix(own): value for key, value in self.words.items() if key.startswith(own)}


def read(named: dict[str, str]) -> Asked:
    """The words of `compare`. Raises ConfigError where they do not fit, also those of the trainings."""
    words = {key: value for key, value in named.items() if key not in OWN_WORDS}
    methods, folders = (named.get(key, "").split() for key in ("methods", "runs"))
    if not methods and not folders:
        raise ConfigError('compare: name methods="a b" to train, or runs="runs/a runs/b" that are finished')
    for_training = [key for key in ("seeds", *words) if key in named and key != "run.dir"]
    if not methods and for_training:
        key = for_training[0]
        raise ConfigError(f'{key}={named[key]}: is for runs that are trained here; name methods="a b" too')
    for key in ("run.name", "method", "experiment", "seed"):
        if key in words:
            raise ConfigError(f'{key}={words[key]}: follows from methods="…" and seeds="…"; leave it out')
    for key in words:
        if ":" in key and key.partition(":")[0] not in methods:
            raise ConfigError(f"{key}={words[key]}: {key.partition(':')[0]} is none of methods={' '.join(methods)}")
    seeds = [count("seeds", word, 0) for word in named.get("seeds", "0").split()]
    if not re.fullmatch(r"[\w][\w.+-]*", name := named.get("name", "runs")):
        raise ConfigError(f"name={name}: expected a plain folder name")
    part_of(named.get("part"))
    checkpoint = named.get("checkpoint")
    if checkpoint not in (None, *CHECKPOINTS):
        raise ConfigError(f"checkpoint={checkpoint}: expected {' or '.join(CHECKPOINTS)}, the one that is scored anew")
    cited = published.of(named["published"]) if "published" in named else []
    asked = Asked(methods, seeds, folders, words, cited, scoring_words(named.get("eval", "")), checkpoint)
    for folder in map(Path, folders):
        if not (folder / "metrics.json").is_file():
            raise ConfigError(
                f"runs: {folder} holds no finished run (metrics.json is missing); finish it, or leave it out"
            )
        expect_fitting(folder / "config.yaml", asked.scoring)
    for method in methods:
        own = asked.words_of(method)
        cfg = config.compose([f"method={method}", *(f"{key}={value}" for key, value in own.items())])
        ahead.expect_inputs(cfg)
        config.restore(config.plain(cfg), asked.scoring)
    return asked


def scoring_words(text: str) -> list[str]:
    """`eval="evaluation.crf=dense data.eval_size=448"` as words. Raises ConfigError."""
    words = text.split()
    for key, value in config.parse_words(words).items():
        if not key.startswith(ANEW):
            raise ConfigError(f"eval: {key}={value}: scores finished runs anew; it takes keys of {', '.join(ANEW)}")
        if key == "evaluation.resolutions":
            raise ConfigError(f"eval: {key}={value}: a table has one resolution; name it with data.eval_size")
    return words
