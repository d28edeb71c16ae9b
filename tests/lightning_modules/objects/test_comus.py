"""COMUS: its stage, its labels, what it refuses, and that scores do not hang on ranks."""

import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError
from engine import setup
from engine.stages.stage import Stage
from grouping import neighbours
from lightning_modules.objects.named import pieces
from pseudo_labels.views import Certain
from tests.conftest import small_words


def built(*words: str):
    one = "method.masks.objects=union"
    cfg, data = setup.build_data(config.compose(small_words("comus", one, *words)))
    return cfg, data, setup.build_model(cfg, data.meta)


@pytest.mark.train
def test_what_is_not_at_a_core_teaches_nothing(tmp_path):
    cfg, data, model = built(f"cache.dir={tmp_path}", "method.clusters.core=60", "method.num_clusters=4")
    setup.connect(model, data)
    results = Stage(cfg, data, model).run()
    table = results["clusters"]
    rows = torch.from_numpy(results["objects"].rows("features")[0])
    own = neighbours.spectral_clusters(neighbours.neighbour_graph(rows, 6), 3, core=60, seed=0)
    assert np.array_equal(table["labels"], own.labels)
    assert np.array_equal(table["assignment"], np.where(own.core, own.labels, -1))
    assert int(table["components"][0]) == own.embedding.components
    view = model.first_labels(results)
    assert isinstance(view, Certain)
    sure = 0
    for number, (label, core) in enumerate(zip(own.labels.tolist(), own.core.tolist(), strict=True)):
        found = view.read(number, (48, 48))  # one object a picture
        assert set(np.unique(found)) == ({0, label + 1} if core else {255})
        sure += core
    assert 0 < sure < 22
    model.staged(results, data)
    assert data.pseudo.read(0, (48, 48)).tolist() == view.read(0, (48, 48)).tolist()


@pytest.mark.train
def test_vectors_are_crops_where_that_is_asked(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        cfg, data, model = built(f"cache.dir={tmp_path}", "method.objects.vectors=crop", "method.objects.size=32")
    assert "tiny has no trained class token: an object is the mean feature of its crop" in caplog.text
    setup.connect(model, data)
    features = Stage(cfg, data, model).run()["objects"].rows("features")[0]
    assert features.shape == (22, model.backbone.dim)


def test_objects_are_what_the_segmenter_does_not_call_background():
    _, _, model = built()
    model.eval()
    images = torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        codes = model.embed(model.features(images))
        logits = model.classify(codes)
        model.head.classifier.bias[0] += (logits[:, 1:].amax(1) - logits[:, 0]).median()
        logits = model.classify(codes)
    masks, boxes = model.objects(images)
    ids = F.interpolate(logits, size=(48, 48), mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(masks, ids > 0)
    assert 0 < masks.float().mean() < 1
    for mask, box in zip(masks, boxes.tolist(), strict=True):
        columns, rows = mask.any(0).nonzero()[:, 0], mask.any(1).nonzero()[:, 0]
        assert box == [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def test_instances_are_connected_pieces_of_a_class():
    classes = torch.zeros(12, 12, dtype=torch.int64)
    classes[:4, :4] = classes[4:8, 4:8] = 2  # these touch at a corner
    classes[8:, :5] = 3
    classes[0, 6:11] = 3  # too small
    sure = torch.arange(144.0).view(12, 12) / 144
    found = pieces(classes, sure)
    assert found.boxes.tolist() == [[0, 0, 8, 8], [0, 8, 5, 12]]
    assert torch.equal(found.masks, torch.stack([classes == 2, (classes == 3) & (torch.arange(12) > 0)[:, None]]))
    assert torch.allclose(found.scores, torch.stack([sure[mask].mean() for mask in found.masks]))
    assert pieces(classes * 0, sure).masks.shape == (0, 12, 12)
    _, _, model = built()
    model.eval()
    valid = torch.ones(1, 48, 48, dtype=torch.bool)
    valid[:, 40:] = False
    seen = model.detections(torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(0)), valid)
    assert len(seen[0].masks)
    assert not seen[0].masks[:, 40:].any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.num_clusters=1"], "method.num_clusters=1: one of them is the background; set 2 or more"),
        (["method.objects.size=33"], "method.objects.size: pictures of 33 x 33 px do not fit"),
        (["method.masks.provider=sam"], "method.masks.provider=sam: not one of"),
    ],
)
def test_refusals(words, message):
    with pytest.raises(ConfigError) as caught:
        built(*words)
    assert str(caught.value).startswith(message)


@pytest.mark.train
def test_too_few_objects_are_refused(tmp_path):
    cfg, data, model = built(f"cache.dir={tmp_path}", "method.num_clusters=40")
    setup.connect(model, data)
    with pytest.raises(ConfigError, match="the 22 objects of the training pictures do not make 39 clusters beside"):
        Stage(cfg, data, model).run()
