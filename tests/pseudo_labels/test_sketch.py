"""MaskDistill in the terms of the stage: its chain is six steps of its own, and nothing in `pseudo_labels/` knows it.

A sketch: tiny networks, the mask by the brightest patch, one detector with a class and a mask for each picture.
"""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from datamodules.base.transforms import Geometry
from grouping.masks import component_at
from pseudo_labels.steps import FitStep, MapStep, ReduceStep, new_record
from pseudo_labels.views import Painted
from retrieval import kmeans
from tests.pseudo_labels.stages import stage

pytestmark = pytest.mark.train
WHOLE = Geometry(32, "none")


class Masks(MapStep):
    """(a) one mask a picture: the component of the brightest patch, and (b) the mean colour of it."""

    name, counted = "masks", "masks"
    settings, geometry, record_bytes = lambda _: {"share": 1.0}, lambda _: WHOLE, lambda _: 1000

    def records(self, batch):
        cells = F.avg_pool2d(batch["image"], 4)
        masks = [component_at(p > p.mean(), int(p.argmax()), 4) for p in cells.mean(1)]
        means = [c[:, m].mean(1)[None] for c, m in zip(cells, masks, strict=True)]
        rows = enumerate(zip(masks, means, strict=True))
        return [new_record(batch, i, batch["image"], (8, 8), masks=m[None], features=f) for i, (m, f) in rows]


class Clusters(ReduceStep):
    """(b) whitened features of the masks in k classes."""

    name, needs, settings = "clusters", ("masks",), lambda _: {"k": 3, "seed": 1234}

    def table(self, results, device):
        points = torch.from_numpy(results["masks"].rows("features")[0])
        points = F.normalize(points / points.std(0), dim=1)
        found = kmeans.fit(points, 3, spherical=False, seed=1234)
        return {"assignment": kmeans.assign(points, found.centroids, spherical=False)}


class Detector(FitStep):
    """(c) a network learns the noisy masks with their classes."""

    name, needs, steps, batch_size = "detector", ("masks", "clusters"), 6, 4
    settings, geometry = lambda _: {"lr": 0.01}, lambda _: Geometry(32, "random", flip_p=0.5)

    def view(self, results):
        return Painted(results["masks"], results["clusters"]["assignment"])

    def module(self, results):
        return Net()


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, 4)

    def training_step(self, batch, _):
        return F.cross_entropy(self.conv(batch["image"]), batch["pseudo"][:, ::4, ::4], ignore_index=255)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Confident(MapStep):
    """(d) predictions of the detector that are sure enough."""

    name, needs, counted = "confident", ("detector",), "masks"
    settings, geometry, record_bytes = lambda _: {"threshold": 0.3}, lambda _: WHOLE, lambda _: 1000

    def begin(self, results):
        self.net = Net()
        self.net.load_state_dict(results["detector"].state())

    def records(self, batch):
        found = []
        for row, maps in enumerate(self.net.conv(batch["image"]).softmax(1)):
            scores = maps[1:].flatten(1).amax(1)
            kept = (scores >= 0.3).nonzero()[:, 0]
            masks = maps[1:][kept] > 0.3
            fields = {"masks": masks, "scores": scores[kept], "classes": kept.short()}
            found.append(new_record(batch, row, batch["image"], (8, 8), **fields))
            found[-1].drop = "" if len(kept) else "no_object"
        return found


def test_the_chain_of_maskdistill_runs_and_ends_in_label_maps(tmp_path):
    work = stage(tmp_path, [Masks(), Clusters(), Detector(), Confident()])
    results = work.run()
    assert results["clusters"]["assignment"].shape == (22,)
    assert set(results["detector"].state()) == {"conv.weight", "conv.bias"}
    maps = [Painted(results["confident"]).read(i, (48, 48)) for i in range(22)]
    assert {m.shape for m in maps} == {(48, 48)}
    kept = [record.keep for record in results["confident"].each()]
    assert [not (m == 255).all() for m in maps] == kept
    assert any(kept)
    assert set(np.unique(maps)) <= {0, 1, 2, 3, 255}
    assert [place.complete for place in work.places.values()] == [True] * 4
