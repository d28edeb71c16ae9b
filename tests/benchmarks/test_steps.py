"""The table of steps has a row for every method, and its seconds add up."""

import time

import pytest
import torch

import config
from benchmarks import stepping, steps
from benchmarks.stepping import Cost, Setting, Timer
from lightning_modules import registry
from models.backbone import Backbone


def test_a_name_has_its_own_time_alone(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0, 9.0, 10.0])
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    timer = Timer()
    with timer.span("step"):
        with timer.span("backbone"):
            pass
        timer.end("backbone")  # no such span is open: nothing ends
        with timer.span("loss"):
            pass
    assert timer.take() == {"step": 10.0 - 3.0 - 4.0, "backbone": 3.0, "loss": 4.0}
    assert timer.take() == {}


def test_gradients_that_reach_a_backbone_are_its_own():
    cfg = config.compose(["backbone.weights=none", "method=dino"]).backbone
    backbone, timer = Backbone(cfg), Timer()
    with stepping.passes(timer):
        maps = backbone.features(torch.rand(1, 3, 32, 32), grad=True).map
        total = maps.square().sum()
        with timer.span("backward"):
            total.backward()
            timer.end("backbone gradient")
    found = timer.take()
    assert set(found) == {"backbone", "backward", "backbone gradient"}
    assert found["backbone gradient"] > found["backward"] >= 0
    assert Backbone.features.__qualname__ == "Backbone.features"


@pytest.mark.train
@pytest.mark.parametrize(
    ("method", "units", "parts"),
    [
        ("hidden_positives", ["step of 4 pictures"], {"loss", "backward", "optimiser", "probes"}),
        ("tokencut", ["picture of the stage"], {"masks", "reading and writing"}),
    ],
)
def test_the_parts_of_a_unit_add_up(method, units, parts, tmp_path):
    found = stepping.costs(steps.default(method, 1, quick=True), tmp_path, 1)
    assert [cost.unit for cost in found] == units
    for cost in found:
        assert set(cost.parts) == parts
        assert min(cost.parts.values()) >= 0
        assert cost.backbone > 0
        assert cost.seconds == pytest.approx(cost.backbone + sum(cost.parts.values()))


def test_every_method_has_a_row_and_every_published_one_a_second():
    chosen = steps.settings("", 1, quick=False)
    assert [setting.method for setting in chosen if setting.name == "default"] == registry.names()
    published = {setting.method: setting for setting in chosen if setting.name != "default"}
    assert published["hidden_positives"].name == "hidden_positives_cocostuff27_vits8"
    assert published["hidden_positives"].cut == "batch 4 of 64"
    assert published["deep_spectral"].name in config.names("experiment")
    assert set(published) == {method for method in registry.names() if stepping.recipe(method)}


def test_made_pictures_are_the_same_each_time():
    source = stepping.MadePictures("train", 2, (40, 50))
    (image, label), (again, _) = source.read(1), source.read(1)
    assert image.shape == (40, 50, 3)
    assert label.shape == (40, 50)
    assert (image == again).all()
    assert (image != source.read(0)[0]).any()


def test_a_row_says_what_is_above_its_floor():
    cost = Cost("step of 4 pictures", 3.0, 1.0, 0.25, {"loss": 1.5, "backward": 0.45, "probes": 0.05}, 100.4)
    cells = steps.row(Setting("stego", "default", ()), cost)
    assert cells[2:] == ["step of 4 pictures", "3", "1", "3.00", "loss 1.5, backward 0.45", "0.25", "100"]
    assert len(cells) == len(steps.HEAD)
    near = Cost("picture of the stage", 1.2, 1.0, None, {"loss": 0.2}, 1.0)
    assert steps.row(Setting("stego", "default", ()), near)[6:8] == ["-", "-"]


def test_the_table_takes_the_place_of_the_one_before():
    page = f"above\n{steps.FIRST}\nold\n{steps.LAST}\nbelow\n"
    assert steps.replaced(page, "new") == f"above\n{steps.FIRST}\nnew\n{steps.LAST}\nbelow\n"
    assert steps.replaced(steps.RESULTS.read_text(), "x")
    with pytest.raises(ValueError, match="lacks the lines"):
        steps.replaced("nothing", "new")
