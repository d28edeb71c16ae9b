"""Mean scores of three seeds, for the recorded bands of slow tests."""

from pathlib import Path
from statistics import mean

import config
from engine import training

SEEDS = (0, 1, 2)


def score(folder: Path, method: str, key: str, *words: str) -> float:
    """Mean of a score of the runs of a method with all seeds, in `folder`; a finished run is not run again."""

    def one(seed: int) -> float:
        own = [word.partition(".")[2].replace("=", "-") for word in words if word.startswith(("method.", "optim."))]
        name = "-".join([method, str(seed), *own])
        run = [f"method={method}", f"seed={seed}", f"run.dir={folder}", f"run.name={name}"]
        return training.train(config.compose([*run, "trainer.progress=none", "evaluation.panels=0", *words]))[key]

    return mean(one(seed) for seed in SEEDS)
