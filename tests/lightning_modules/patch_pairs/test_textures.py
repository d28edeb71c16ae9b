"""What the questions teach: adjacency tells two textures apart that random features do not, place beats chance."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import config
from engine import training

pytestmark = [pytest.mark.train, pytest.mark.slow]

SIDE, PICTURES = 64, 96


def streaks(rng: np.random.Generator, along: int) -> np.ndarray:
    """Noise [SIDE,SIDE] that is smooth along one axis, of mean 0 and deviation 1."""
    wide = np.moveaxis(rng.standard_normal((SIDE, SIDE + 8)), 1, along)
    parts = [np.take(wide, range(shift, shift + SIDE), along) for shift in range(8)]
    return sum(parts) / math.sqrt(8)


def shading(rng: np.random.Generator) -> np.ndarray:
    """Brightness [SIDE,SIDE,1] and a tint that change from one square of 8 px to the next, whatever is there."""
    squares = rng.uniform(-1, 1, (SIDE // 8, SIDE // 8, 3)) * 0.5 + rng.uniform(-1, 1, (SIDE // 8, SIDE // 8, 1))
    return squares.repeat(8, axis=0).repeat(8, axis=1)


def two_textures(root: Path) -> Path:
    """Pictures of two halves, at any angle: streaks along rows and along columns, under the same shading."""
    rng = np.random.default_rng(0)
    for split, count in (("train", PICTURES), ("val", 16)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-SIDE / 6, SIDE / 6)
            rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
            half = (rows * np.sin(angle) + columns * np.cos(angle) > offset).astype(np.uint8)
            texture = np.where(half == 1, streaks(rng, 0), streaks(rng, 1))[..., None]
            values = 128 + 40 * texture + 30 * shading(rng)
            Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(root / "images" / split / f"{number}.png")
            Image.fromarray(half).save(root / "labels" / split / f"{number}.png")
    (root / "classes.json").write_text(json.dumps(["rows", "columns"]))
    return root


WORDS = [
    "data=folder", f"data.train_size={SIDE}", f"data.eval_size={SIDE}", "data.batch_size=32", "data.workers=0",
    "data.train_crop=none", "data.eval_crop=none", "backbone=net10a", "backbone.create.widths=[16,16,32,32,32,32]",
    "backbone.create.padding=same", "trainer=cpu", "trainer.progress=none", "trainer.val_every=1000",
    "evaluation.panels=0", "evaluation.kmeans.points=20000", "trainer.log_every=1",
]  # fmt: skip


def run(folder: Path, name: str, *words: str) -> dict:
    return training.train(config.compose([*WORDS, f"run.dir={folder}/runs", f"run.name={name}", *words]))


def test_adjacency_separates_two_textures_and_random_features_do_not(tmp_path):
    data = f"data.root={two_textures(tmp_path / 'tree')}"
    random = run(tmp_path, "random", data, "method=kmeans_baseline", "trainer.max_steps=1")
    words = ["method=cooccurrence", "method.cut=image", "method.side=16", "method.augment.drop_p=0", "data.flip_p=0.5"]
    trained = run(tmp_path, "trained", data, *words, "trainer.max_steps=300")
    assert random["val/kmeans/acc"] < 80
    assert trained["val/kmeans/acc"] > 95
