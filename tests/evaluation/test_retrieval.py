"""Read-out by retrieval: labelled segments of training pictures, the vote of the nearest, and what reads labels."""

import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError
from engine import evaluating, setup
from evaluation.retrieval import SegmentBank, SegmentRetrieval
from tests.conftest import run_small, small_words

CLASSES = 3


def readout(**changes) -> SegmentRetrieval:
    words = [f"evaluation.retrieval.{key}={value}" for key, value in ({"k": 1, "cells": "[2,2]"} | changes).items()]
    return SegmentRetrieval(config.compose(words).evaluation.retrieval, CLASSES)


def quarters(*classes: int) -> torch.Tensor:
    """A label map [8,8] whose quarters have these classes."""
    return torch.tensor(classes).view(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)


def codes_of(labels: torch.Tensor) -> torch.Tensor:
    """Codes [B,3,8,8] that tell the class, with a little of the others."""
    return F.one_hot(labels, CLASSES).permute(0, 3, 1, 2).float() + 0.05


ALL = torch.ones(2, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("location", ["centred", "none"])
def test_pictures_of_known_classes_are_read_exactly(location, upsample):
    found = readout(location=location, upsample=upsample)
    train = torch.stack([quarters(0, 1, 2, 0), quarters(1, 1, 0, 2)])
    found.bank = found.labelled(codes_of(train), train, ALL)
    assert torch.allclose(found.bank.vectors.norm(dim=1), torch.ones(len(found.bank.labels)))
    if upsample == 1:
        assert torch.equal(found.bank.vectors.argmax(1), found.bank.labels)
    seen = torch.stack([quarters(2, 0, 1, 1), quarters(0, 0, 1, 2)])
    agreed = (found.predict(codes_of(seen), ALL) == seen).float().mean()
    assert agreed == 1 if upsample == 1 else agreed > 0.8


def test_a_segment_has_the_class_of_most_of_its_cells_and_their_prototype():
    """One segment a picture; a third of the cells is of another class and does not enter, as in the release (7.1)."""
    found = readout(cells="[1,1]")
    label = torch.zeros(1, 8, 8, dtype=torch.long)
    label[:, :, :2] = 1
    codes = torch.randn(1, 3, 8, 8)
    bank = found.labelled(codes, label, ALL[:1])
    assert bank.labels.tolist() == [0]
    unit = F.normalize(codes, dim=1)[0, :, :, 2:].flatten(1)
    assert torch.allclose(bank.vectors[0], F.normalize(unit.sum(1), dim=0), atol=1e-6)


def test_segments_without_label_and_padding_stay_out():
    found = readout()
    label = quarters(0, 1, 2, 1)[None].clone()
    label[:, 4:, :4] = 255
    valid = ALL[:1].clone()
    valid[:, :, 4:] = False
    bank = found.labelled(codes_of(quarters(0, 1, 2, 1)[None]), label, valid)
    assert bank.labels.tolist() == [0]


def test_the_nearest_vote():
    found = readout(k=3, cells="[1,1]")
    near = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [1.0, 0.0, 0.1], [1.0, 0.05, 0.05], [0.0, 1.0, 0.0]]), dim=1)
    found.bank = SegmentBank(near, torch.tensor([2, 2, 0, 1]))
    codes = torch.tensor([1.0, 0.05, 0.05]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert (found.predict(codes, ALL[:1]) == 2).all()
    found.bank = SegmentBank(near, torch.tensor([2, 1, 0, 1]))  # all differ: the smallest class wins
    assert (found.predict(codes, ALL[:1]) == 0).all()


@pytest.mark.train
def test_a_run_scores_it_and_eval_reproduces_it(tmp_path):
    words = ["evaluation.retrieval.k=3", "evaluation.retrieval.cells=[3,3]", "trainer.max_steps=2"]
    run = run_small("kmeans_baseline", tmp_path, "x", *words)
    assert 0 < run.metrics["val/retrieval/miou"] <= run.metrics["val/retrieval/acc"] <= 100
    assert run.metrics["protocol/retrieval"] == (
        "labels of training pictures, 3 nearest segments, grid 3x3, 1000 pictures at most"
    )
    last = run.folder / "checkpoints" / "last.ckpt"
    again = evaluating.evaluate(last, [])
    for key in ("val/retrieval/acc", "val/retrieval/miou"):
        assert again[key] == run.metrics[key]
    assert "val/retrieval/acc" not in evaluating.evaluate(last, ["evaluation.retrieval.k=0"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("grid=hex", "evaluation.retrieval.grid=hex: not one of linspace, ceil"),
        (
            "cells=[0,2]",
            "evaluation.retrieval.cells=[0, 2]: expected a list of 2 whole numbers from 1 to 256, as in [5,5]",
        ),
        ("upsample=0", "evaluation.retrieval.upsample=0: must be at least 1"),
        ("pictures=0", "evaluation.retrieval.pictures=0: must be at least 1"),
        ("k=-1", "evaluation.retrieval.k=-1: must not be negative"),
    ],
)
def test_what_is_refused(word, message):
    with pytest.raises(ConfigError) as caught:
        readout(**dict([word.split("=")]))
    assert str(caught.value) == message


def test_data_without_labels_cannot_be_read_so():
    cfg, data = setup.build_data(config.compose(small_words("kmeans_baseline", "evaluation.retrieval.k=15")))
    with pytest.raises(ConfigError) as caught:
        setup.build_model(cfg, type(data.meta)())
    assert str(caught.value) == (
        "evaluation.retrieval.k=15: this read-out votes by labels of training pictures and the data has none; set "
        "evaluation.retrieval.k=0"
    )
