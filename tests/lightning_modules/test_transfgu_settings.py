"""TransFGU: settings that cannot be run with, in exact words."""

import pytest

import config
from common.errors import ConfigError
from engine import setup
from tests.conftest import small_words


def build(*words: str) -> None:
    cfg, data = setup.build_data(config.compose([*small_words("transfgu"), *words]))
    setup.build_model(cfg, data.meta)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.banks=both"], "method.banks=both: not one of auto, all, foreground, split"),
        (["method.augment.draw=sides"], "method.augment.draw=sides: not one of area, side, tenths; did you mean side?"),
        (
            ["method.stage.interpolation=cubic"],
            "method.stage.interpolation=cubic: not one of faithful, nearest, bilinear, bilinear_plain, nearest_corner",
        ),
        (["method.crops.tokens=x"], "method.crops.tokens=x: not one of auto, encoded, pooled"),
        (
            ["method.crops.tokens=pooled", "method.maps.token=class"],
            "method.crops.tokens=pooled: a class token belongs to a whole pass, not to a window of it; use "
            "method.crops.tokens=encoded, or method.maps.token=pooled",
        ),
        (["method.kmeans.length=x"], "method.kmeans.length=x: not one of auto, raw, unit"),
        (["method.maps.power=x"], "method.maps.power=x: expected auto or a number from 0 to 1"),
        (["method.empty=x"], "method.empty=x: not one of ignore, first"),
        (["method.maps.divisor=0"], "method.maps.divisor=0: must be at least 1"),
        (["method.maps.share=0"], "method.maps.share=0: expected a number above 0, at most 1"),
        (["method.crops.foreground=1"], "method.crops.foreground=1: expected a number from 0 to below 1"),
        (["method.crops.max_per_image=0"], "method.crops.max_per_image=0: must be at least 1, or null for all"),
        (
            ["method.restarts.epoch=5", "method.restarts.repeat=20"],
            "method.restarts.repeat=20: counts passes over the pictures, but method.restarts.epoch=5 counts steps; set "
            "method.restarts.epoch=null",
        ),
        (["method.restarts.epoch=0"], "method.restarts.epoch=0: must be at least 1"),
        (["method.restarts.start=0"], "method.restarts.start=0: must be at least 1"),
        (
            ["method.restarts.intervals=[2,0]"],
            "method.restarts.intervals=[2, 0]: expected a list of whole numbers of at least 1, 1 or more of "
            "them, as in [2]",
        ),
        (
            ["method.augment.sides=[0.9,0.4]"],
            "method.augment.sides=[0.9, 0.4]: expected a list of 2 numbers above 0, at most 1, in ascending "
            "order, as in [0.4,0.9]",
        ),
        (["method.weights.diversity=-1"], "method.weights.diversity=-1: must not be negative"),
        (["method.num_clusters=1"], "method.num_clusters=1: must be at least 2"),
        (
            ["method.num_clusters=2", "method.background=true"],
            "method.num_clusters=2: must be at least 2 beside the background",
        ),
        (
            ["method.banks=split", "method.background=true"],
            "method.banks=split: makes concepts of the background; set method.background=false, or "
            "method.banks=foreground",
        ),
        (
            ["method.banks=split", "method.things=12"],
            "method.things=12: with method.banks=split it must be 1 to 11, fewer than method.num_clusters=12",
        ),
        (
            ["method.stage.size=null"],
            "method.stage.size=null: windows need pictures of one size; set it in px, or [H,W]",
        ),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_run_with(words, message):
    with pytest.raises(ConfigError) as caught:
        build(*words)
    assert str(caught.value) == message
