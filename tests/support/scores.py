"""Mean scores of some seeds, for recorded bands: of whole runs, and of the pseudo-labels of offline stages."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import torch

import config
from common.spec import IGNORE
from engine import setup, training
from engine.stages.stage import Stage
from evaluation.metrics import SegmentationScore

SEEDS = (0, 1, 2)
AS_CLASS_TOKENS = ("method.crops.tokens=encoded", "method.kmeans.length=raw", "method.maps.power=1")
"""TransFGU as for class tokens, where the network has none."""


def score(folder: Path, method: str, key: str, *words: str) -> float:
    """Mean of a score of the runs of a method with all seeds, in `folder`; a finished run is not run again."""

    def one(seed: int) -> float:
        own = [word.partition(".")[2].replace("=", "-") for word in words if word.startswith(("method.", "optim."))]
        name = "-".join([method, str(seed), *own])
        run = [f"method={method}", f"seed={seed}", f"run.dir={folder}", f"run.name={name}"]
        return training.train(config.compose([*run, "trainer.progress=none", "evaluation.panels=0", *words]))[key]

    return mean(one(seed) for seed in SEEDS)


def stage_score(folder: Path, method: str, *words: str, seeds: Sequence[int] = SEEDS) -> float:
    """Mean mIoU of the pseudo-labels of all training pictures, which have labels, clusters matched to classes; what has
    no pseudo-label counts as background."""
    return mean(_pseudo_labels(folder, [f"method={method}", f"seed={seed}", *words]) for seed in seeds)


def _pseudo_labels(folder: Path, words: Sequence[str]) -> float:
    quiet = ["data.workers=0", "trainer=cpu", "trainer.progress=none", f"cache.dir={folder}"]
    cfg, data = setup.build_data(config.compose([*words, *quiet]))
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    results = Stage(cfg, data, model).run()
    view, source, classes = model.shown(results)["pseudo-labels"], data.source("train"), data.meta.num_classes
    score = SegmentationScore(classes, classes)
    for index in range(len(source)):
        truth = source.read(index)[1]
        found = torch.from_numpy(view.read(index, truth.shape))
        score.update(torch.where(found == IGNORE, 0, found), torch.from_numpy(truth))
    return score.compute().miou
