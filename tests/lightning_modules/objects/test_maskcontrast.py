"""MaskContrast: order of a step, queue, what takes no part, objects and classes of its own, a trained network."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import config
from common.errors import ConfigError, DataError
from common.spec import ClassMeta
from datamodules.base.dataset import Collate
from datamodules.base.views import make_views
from engine import setup
from engine.stages.stage import Stage
from evaluation import readout
from lightning_modules.objects.picture_clusters import PictureClusters
from losses.objects import mask_contrast as losses
from tests.conftest import run_small, small_words

META = ClassMeta(tuple("abcd"), tuple((i, i, i) for i in range(4)))
TRAINED = [
    "backbone=mobilenetv2", "backbone.weights=none", "backbone.frozen=false", "backbone.levels=[1,3]",
    "backbone.freeze_norms=true",
]  # fmt: skip


def built(*words: str):
    cfg = config.compose(small_words("maskcontrast", "method.num_clusters=4", "method.queue.size=8", *words))
    model = setup.build_model(cfg, META)
    model.head.object.weight.data.mul_(20)  # so that its salience has two sides
    return model


def views(count: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    draw, found = torch.Generator().manual_seed(seed), {}
    for name in ("query", "key"):
        found[name] = torch.rand(count, 3, 48, 48, generator=draw)
        found[f"{name}.pseudo"] = (torch.rand(count, 48, 48, generator=draw) < 0.4).long()
        found[f"{name}.valid"] = torch.ones(count, 48, 48, dtype=torch.bool)
    return found


def test_the_loss_is_that_of_the_pieces_and_the_copy_moves_before_it_looks():
    model, batch = built("method.momentum=0.5", "method.weights.salience=2"), views()
    with torch.no_grad():
        for value in model.head.parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    before = {name: value.clone() for name, value in model.key_head.named_parameters()}
    queue = model.queue.rows().clone()
    found = model.loss(batch, None)
    for name, value in model.key_head.named_parameters():
        torch.testing.assert_close(value, (before[name] + dict(model.head.named_parameters())[name]) / 2)
    levels = [model.backbone.features(batch[name]).levels for name in ("query", "key")]
    keys = model.key_head.classify(model.key_head(levels[1]))
    prototypes = losses.mask_prototypes(keys, batch["key.pseudo"] == 1)
    inside = batch["query.pseudo"] == 1
    codes = model.head(levels[0])
    weights = losses.class_weights(F.pad(inside.sum((1, 2)), (0, 8)))
    contrast = losses.object_contrast(
        model.head.classify(codes), inside, torch.cat([prototypes, queue]), weights, 0.5, own=torch.arange(4)
    )
    salience = losses.balanced_salience(model.head.salience(codes), inside)
    torch.testing.assert_close(found.parts["contrast"], contrast.detach())
    torch.testing.assert_close(found.total, contrast + 2 * salience)
    assert torch.equal(found.codes, codes)
    assert torch.equal(model.queue.rows(), queue)  # it is written after the step
    model.after_step()
    assert torch.equal(model.queue.rows()[:4], prototypes)
    assert torch.equal(model.queue.rows()[4:], queue[4:])
    found.total.backward()
    assert all(value.grad is not None for value in model.head.parameters())
    assert all(value.grad is None for value in model.key_head.parameters())


@pytest.mark.parametrize("empty", ["skip", "keep"])
def test_a_key_without_an_object(empty):
    """It takes no part, or stands as a zero prototype in the loss and the queue, as released."""
    model, batch = built(f"method.queue.empty={empty}"), views()
    batch["key.pseudo"][1] = 0
    whole = model.loss(batch, None).parts["contrast"]
    model.after_step()
    zeros = (model.queue.rows() == 0).all(1)
    assert zeros.sum() == (empty == "keep")
    assert int(model.queue.pointer) == (4 if empty == "keep" else 3)
    other = built(f"method.queue.empty={empty}")
    rows = [0, 2, 3]
    without = other.loss({name: value[rows] for name, value in batch.items()}, None).parts["contrast"]
    assert torch.allclose(whole, without) == (empty == "skip")


def test_a_picture_without_a_query_object_is_a_negative_alone():
    model, batch = built(), views()
    batch["query.pseudo"][2] = 0
    found = model.loss(batch, None)
    assert found.parts["contrast"].isfinite()
    model.after_step()
    assert int(model.queue.pointer) == 4


def test_classes_are_salience_with_the_cluster_of_the_picture():
    model = built("method.own.threshold=0.2").eval()
    features = model.features(views()["query"])
    with torch.no_grad():
        salience = model.head.salience(model.embed(features))
        vectors = model.vectors(features)
        maps, large = (
            model.head.classify(model.embed(features)),
            F.interpolate(salience[:, None], (48, 48), mode="bilinear"),
        )
        wanted, objects = losses.object_embedding(maps, large[:, 0], 0.2)
        assert torch.allclose(vectors, wanted, atol=1e-5)
        assert objects.any(dim=(1, 2)).all()
        model.own.mean.zero_()
        model.own.axes.copy_(torch.eye(16))
        model.own.centroids.copy_(F.normalize(vectors[[2, 0, 1]], dim=1))
        scores = model.scores(features)
    assert scores.shape == (4, 4, *salience.shape[1:])
    assert scores[:3].argmax(1).flatten(1).amax(1).tolist() == [2, 3, 1]
    assert torch.equal(scores.argmax(1) > 0, salience > 0.2)
    pixels = readout.predict(scores, (48, 48))
    assert torch.equal(pixels > 0, objects)
    assert pixels[:3].flatten(1).amax(1).tolist() == [2, 3, 1]


def test_padding_has_no_object():
    model = built("method.own.threshold=0").eval()
    model.head.object.weight.data.fill_(1.0)  # codes are not negative, so everything is of the object
    batch = {"image": views()["query"], "valid": torch.ones(4, 48, 48, dtype=torch.bool)}
    batch["valid"][:, 24:] = False
    with torch.no_grad():
        salience = model.seen_objects(model.features_of(batch))[2]
        masks, boxes = model.objects_inside(batch["image"], batch["valid"])
    assert (salience[:, 24:] == -torch.inf).all()
    assert salience[:, :24].isfinite().all()
    assert masks[:, :24].all()
    assert boxes.tolist() == [[0, 0, 48, 24]] * 4


class Settings:
    components, empty, restarts, iterations = 3, "skip", 2, 20


def test_clusters_of_pictures_are_of_whitened_vectors(caplog):
    """A direction of small spread tells two groups apart where one of large spread says nothing; zeros are no point."""
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(60, 3, generator=draw) * torch.tensor([1.0, 1e-3, 1e-3])
    vectors[:, 1] += torch.where(torch.arange(60) < 30, 0.05, -0.05)
    clusters = PictureClusters(2, 3)
    clusters.fit(torch.cat([vectors, torch.zeros(20, 3)]), Settings, 0)
    found = clusters.assign(vectors)
    assert clusters.fitted
    assert len(found[:30].unique()) == len(found[30:].unique()) == 1
    assert found[0] != found[-1]
    few = PictureClusters(5, 3)
    with caplog.at_level(logging.WARNING):
        few.fit(torch.cat([vectors[:3], torch.zeros(20, 3)]), Settings, 0)
    assert "3 pictures show an object, for 5 clusters of objects: all of them are one cluster" in caplog.text
    assert torch.equal(few.assign(vectors), torch.zeros(60, dtype=torch.int64))


def test_held_parts_stay_as_they_are():
    words = [word for word in TRAINED if "freeze_norms" not in word]
    model = built(*words, "method.freeze=[conv_stem,bn1]").train()
    for network in (model.backbone, model.key_backbone):
        assert not network.net.bn1.training
        assert any(part.training for part in network.modules() if isinstance(part, nn.BatchNorm2d))
    assert not any(value.requires_grad for value in model.backbone.net.conv_stem.parameters())
    assert not any(value.requires_grad for value in model.key_backbone.parameters())


@pytest.mark.train
def test_a_network_that_is_trained_takes_its_copy_with_it(tmp_path):
    words = [*TRAINED, "method.masks.provider=spectral", "method.momentum=0.5", f"cache.dir={tmp_path / 'cache'}"]
    run = run_small("maskcontrast", tmp_path, "x", *words)
    start = setup.build_model(config.restore(run.checkpoint["labelfree"]["config"]), META).state_dict()
    name = next(name for name in run.weights if name.startswith("backbone.net.") and name.endswith("conv_pw.weight"))
    trained, copy, before = run.weights[name], run.weights[f"key_{name}"], start[name]
    assert 0 < (copy - trained).abs().max() < (before - trained).abs().max()
    assert torch.equal(start[f"key_{name}"], before)
    assert run.metrics["val/foreground/iou"] is not None


def apart(run) -> float:
    """Mean cosine of the prototypes of one object in two new crops, less that of the prototypes of two objects."""
    cfg, data = setup.build_data(config.restore(run.checkpoint["labelfree"]["config"]))
    model = setup.restore_model(run.checkpoint, cfg, data.meta).eval()
    setup.connect(model, data)
    model.staged(Stage(cfg, data, model).run(), data)
    pictures = data.dataset("train", data.train_geometry, "x", pseudo=data.pseudo)
    batch = Collate(8)([pictures[index] for index in range(len(pictures))])
    made = make_views({name: batch[name] for name in ("image", "valid", "pseudo")}, model.views, 0, 1000)
    with torch.no_grad():
        rows = [
            losses.mask_prototypes(
                model.head.classify(model.embed(model.features(made[name]))), made[f"{name}.pseudo"] == 1
            )
            for name in model.views
        ]
    cosines = rows[0] @ rows[1].T
    own = torch.eye(len(cosines), dtype=torch.bool)
    return float(cosines[own].mean() - cosines[~own].mean())


@pytest.mark.train
def test_the_contrast_tells_objects_apart(tmp_path):
    """Without it, a head that learns the masks alone hardly does. Recorded (mean of four crops) after 120 steps: 0.74,
    0.78, 0.75 (seeds 0, 1, 2), without it 0.09, 0.04 (0, 1); after 40 steps 0.21, 0.22, without it 0.13, 0.06."""
    words = ["trainer.max_steps=60", "trainer.val_every=100", "evaluation.panels=0", "method.queue.size=32"]
    words += ["optim.head.lr=3e-3", f"cache.dir={tmp_path / 'cache'}"]
    ours = apart(run_small("maskcontrast", tmp_path, "on", *words))
    assert ours > apart(run_small("maskcontrast", tmp_path, "off", *words, "method.weights.contrast=0")) + 0.1


@pytest.mark.train
def test_pictures_without_an_object_are_not_trained_on(tmp_path):
    """Masks of a folder for three pictures alone."""
    for index in (1, 4, 7):
        path = tmp_path / "masks" / "train" / f"{index:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        ids = np.zeros((48, 48), np.uint8)
        ids[10:30, 10:30] = 255
        Image.fromarray(ids).save(path)
    words = ["method.masks.provider=folder", f"method.masks.root={tmp_path / 'masks'}", f"cache.dir={tmp_path}"]
    cfg, data = setup.build_data(config.compose(small_words("maskcontrast", *words)))
    model = setup.build_model(cfg, data.meta)
    model.staged(Stage(cfg, data, model).run(), data)
    assert np.flatnonzero(data.usable).tolist() == [1, 4, 7]
    run = run_small("maskcontrast", tmp_path, "x", *words)
    assert 0 < run.metrics["val/own/miou"] is not None


@pytest.mark.train
def test_no_object_anywhere_is_refused(tmp_path):
    words = ["method.masks.least=0.99", f"cache.dir={tmp_path}"]
    with pytest.raises(DataError, match=r"method\.masks: no training picture has an object, so there is nothing"):
        run_small("maskcontrast", tmp_path, "x", *words)


REFUSED = {
    "method.queue.size=10": (
        "method.queue.size=10: must be a multiple of data.batch_size=4, the batch over all devices, so that it holds "
        "whole steps; set method.queue.size=8"
    ),
    "method.num_clusters=1": "method.num_clusters=1: one of them is the background; set 2 or more",
    "method.freeze=[conv1]": (
        "method.freeze=['conv1']: the whole backbone is frozen; set backbone.frozen=false or method.freeze=[]"
    ),
    "data.train_crop=keep": "data.train_crop=keep: padding would become patches of the loss; use random or center",
    "method.masks.objects=each": "method.masks.objects=each: not one of union, best",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refusals(word):
    with pytest.raises(ConfigError) as caught:
        built(word)
    assert str(caught.value) == REFUSED[word]


def test_a_part_that_is_not_there_is_named():
    with pytest.raises(
        ConfigError, match=r"method.freeze: mobilenetv2_100.ra_in1k has no part 'layer1'; it has conv_stem,"
    ):
        built(*TRAINED, "method.freeze=[layer1]")
