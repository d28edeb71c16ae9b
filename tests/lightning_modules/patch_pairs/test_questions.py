"""What the questions teach: adjacency tells two textures apart that random features do not, place beats chance."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import config
from common import chance
from common.spec import ClassMeta
from evaluation import readout
from evaluation.metrics import SegmentationScore
from lightning_modules import registry
from lightning_modules.patch_pairs.base import PatchPairs
from retrieval import kmeans

pytestmark = [pytest.mark.train, pytest.mark.slow, pytest.mark.timeout(1200)]

SIDE = 64
"""Px of the pictures of two textures."""
META = ClassMeta(names=("rows", "columns"), palette=((0, 0, 0), (9, 9, 9)))
WORDS = [
    "data=scenes", "trainer=cpu", "method.num_clusters=2", "backbone=net10a", "backbone.create.padding=same",
    "backbone.create.widths=[16,16,32,32,32,32]", "method.cut=image", "method.augment.drop_p=0",
    "method.head.dropout=0", "method.head.channels=64", "method.head.hidden=64", "method.head.norm=batch",
]  # fmt: skip


def streaks(rng: np.random.Generator, along: int) -> np.ndarray:
    """Noise [SIDE,SIDE] that is smooth along one axis, of mean 0 and deviation 1."""
    wide = np.moveaxis(rng.standard_normal((SIDE, SIDE + 8)), 1, along)
    return sum(np.take(wide, range(shift, shift + SIDE), along) for shift in range(8)) / math.sqrt(8)


def two_textures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Grey pictures [n,3,SIDE,SIDE] of two parts, streaks along rows and along columns, and the part of each pixel."""
    rng = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-SIDE / 6, SIDE / 6)
        rows, columns = np.mgrid[:SIDE, :SIDE] - SIDE / 2
        part = rows * np.sin(angle) + columns * np.cos(angle) > offset
        images.append(0.5 + 0.18 * np.where(part, streaks(rng, 0), streaks(rng, 1)))
        labels.append(part)
    grey = torch.from_numpy(np.stack(images)).float().clamp(0, 1)
    return grey[:, None].expand(-1, 3, -1, -1), torch.from_numpy(np.stack(labels)).long()


def model_of(method: str, *words: str) -> PatchPairs:
    return registry.method_class(method)(config.compose([*WORDS, f"method={method}", *words]), META)


def train(model: PatchPairs, images: Tensor, steps: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The costs of so many steps. Probes are left out: they see whole pictures and cost more than the method."""
    at = {"step": 0}
    monkeypatch.setattr(type(model), "global_step", property(lambda _: at["step"]))
    monkeypatch.setattr(model, "_plain", lambda _: None)
    trained = [parameter for group in model.param_groups() for parameter in group["params"]]
    optimizer, found = torch.optim.Adam(trained, lr=1e-3), []
    for at["step"] in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=chance.generator(0, "test.batch", at["step"]))
        views = {"image": images[chosen], "recoloured": images[chosen]}
        views["valid"] = torch.ones(batch, *images.shape[-2:], dtype=torch.bool)
        loss = model.loss(views, None).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found


@torch.no_grad()
def told_apart(model: PatchPairs) -> float:
    """Accuracy of two clusters of codes, percent: k-means on 32 pictures, scored on 16 others."""
    model.eval()
    codes = [F.normalize(model.embed(model.features(two_textures(*which)[0])), dim=1) for which in ((32, 1), (16, 2))]
    rows = codes[0].permute(0, 2, 3, 1).flatten(0, 2)[::3]
    centroids = kmeans.fit(rows.contiguous(), 2, spherical=True, seed=0).centroids
    score = SegmentationScore(2, 2)
    score.update(readout.predict(readout.cosines(codes[1], centroids), (SIDE, SIDE)), two_textures(16, 2)[1])
    model.train()
    return score.compute().acc


def test_adjacency_separates_two_textures_and_random_features_do_not(monkeypatch):
    model = model_of("cooccurrence", "method.side=16")
    assert told_apart(model) < 70
    costs = train(model, two_textures(512, 0)[0], 600, 64, monkeypatch)
    assert np.mean(costs[-50:]) < math.log(2)
    assert told_apart(model) > 95


@pytest.mark.realdata
def test_the_place_of_a_patch_is_found_better_than_by_chance_on_real_pictures(pictures, monkeypatch):
    files = sorted((pictures / "camvid" / "images" / "train").rglob("*.jpg"))[::2][:128]
    images = torch.stack([torch.from_numpy(np.array(Image.open(f).convert("RGB").resize((128, 96)))) for f in files])
    model = model_of("context_prediction", "method.side=24", "method.head.cells=3")
    costs = train(model, images.permute(0, 3, 1, 2).float() / 255, 300, 32, monkeypatch)
    assert np.mean(costs[-50:]) < math.log(8) - 0.1
