"""`backbone.cache_features`: the same training within half-precision rounding, without the backbone; refusals."""

import csv

import numpy as np
import pytest
import torch

import config
from common.errors import ConfigError
from common.formats.sums import read_sealed
from engine import setup
from models.backbone import Backbone
from models.feature_store import FeatureStore
from tests.conftest import run_small, small_words
from tests.test_ddp import ROUNDING, run_two

KEPT = ["data.flip_p=0", "backbone.cache_features=true"]
METHODS = {
    "stego": [],
    "hidden_positives": ["method.lhp.attention=affinity", "method.alpha=0"],
}


def losses(run) -> list[float]:
    with (run.folder / "metrics.csv").open() as file:
        rows = [row["train/loss"] for row in csv.DictReader(file)]
    return [float(value) for value in rows if value]


@pytest.mark.train
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_curve_is_that_without_and_the_backbone_rests(method, tmp_path, monkeypatch):
    words = ["data.flip_p=0", *METHODS[method]]
    plain = run_small(method, tmp_path, "plain", *words)
    cache = f"cache.dir={tmp_path}/cache"
    kept = run_small(method, tmp_path, "kept", *words, "backbone.cache_features=true", cache)
    assert losses(kept) == pytest.approx(losses(plain), rel=5e-3)
    assert losses(kept) != losses(plain)  # half precision, so it was used
    assert kept.metrics["val/linear/acc"] == pytest.approx(plain.metrics["val/linear/acc"], abs=1.0)

    passes = []
    real = Backbone.features

    def counted(self, images, *args, **kwargs):
        passes.append(len(images))
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(Backbone, "features", counted)
    again = run_small(method, tmp_path, "again", *words, "backbone.cache_features=true", cache)
    assert losses(again) == losses(kept)
    steps = 8 * 4  # at the least what eight steps of four pictures would have cost without
    first_pool = 64 if method == "hidden_positives" else 0
    fits = 22 * (1 + (again.metrics["best/step"] < 8))  # k-means on 22 pictures, for the last and for another best step
    panels = 2  # seen as a whole
    assert sum(passes) <= 2 + fits + panels + first_pool < fits + first_pool + steps  # 2: shapes


@pytest.mark.train
def test_changed_features_are_computed_again(tmp_path, caplog):
    words = ["trainer.max_steps=3", f"cache.dir={tmp_path}", *KEPT]
    plain = run_small("stego", tmp_path, "plain", *words)
    files = sorted((tmp_path / "features").glob("*.features"))
    for path in files:
        rows = np.memmap(path, np.float16, "r+")
        rows[:: len(FeatureStore(path).rows[0])][: len(FeatureStore(path).rows)] += 1
        rows.flush()
    again = run_small("stego", tmp_path, "again", *words)
    lines = [line for line in caplog.messages if line.endswith("are not what was written; they are computed again")]
    assert {line.partition(":")[0] for line in lines} == set(map(str, files))
    for name, value in plain.weights.items():
        assert torch.allclose(again.weights[name].double(), value.double(), rtol=0, atol=10 * ROUNDING), name


@pytest.mark.ddp
def test_two_processes_write_the_file_of_one(tmp_path):
    words = ["trainer.max_steps=2", *KEPT]
    one = run_small("stego", tmp_path, "one", *words, f"cache.dir={tmp_path}/one")
    folder = run_two("stego", tmp_path, *words, f"cache.dir={tmp_path}/both")
    first, second = ({p.name: p for p in (tmp_path / n / "features").iterdir()} for n in ("one", "both"))
    assert first.keys() == second.keys()
    assert len(first) == 4
    for name, path in first.items():
        if name.endswith(".json"):
            facts = [{**read_sealed(p), "of_sums": None} for p in (path, second[name])]
            assert facts[0] == facts[1]
        else:
            values = [torch.from_numpy(np.array(FeatureStore(p).rows)) for p in (path, second[name])]
            assert torch.allclose(*values, rtol=2e-3, atol=2e-3)
    weights = setup.read_checkpoint(folder / "checkpoints" / "last.ckpt")["state_dict"]
    assert torch.allclose(weights["head.linear.weight"], one.weights["head.linear.weight"], rtol=0, atol=10 * ROUNDING)


@pytest.mark.train
@pytest.mark.parametrize(
    ("method", "words", "message"),
    [
        (
            "stego", ["data.train_crop=random"],
            "backbone.cache_features=true: data.train_crop=random cuts pictures by chance or leaves their sizes; set "
            "data.train_crop=center, five or none, or backbone.cache_features=false",
        ),
        (
            "stego", ["data.flip_p=0.5"],
            "backbone.cache_features=true: data.flip_p=0.5 mirrors pictures by chance; set data.flip_p=0, or "
            "backbone.cache_features=false",
        ),
        (
            "kmeans_baseline", [],
            "backbone.cache_features=true: method=kmeans_baseline does not train, so it sees every picture once; set "
            "backbone.cache_features=false",
        ),
        (
            "dino", [],
            "backbone.cache_features=true: method=dino trains the backbone; set backbone.cache_features=false",
        ),
        (
            "hidden_positives", [],
            "backbone.cache_features=true: method=hidden_positives looks at the attention of the backbone, which is "
            "not kept; set method.lhp.attention=affinity, or backbone.cache_features=false",
        ),
    ],
)  # fmt: skip
def test_refusals(method, words, message, tmp_path):
    with pytest.raises(ConfigError) as caught:
        run_small(method, tmp_path, "r", *KEPT, *words)
    assert str(caught.value) == message


def test_every_backbone_can_be_asked():
    for name in config.names("backbone"):
        assert config.load_group("backbone", name)["cache_features"] is False
    assert config.compose(small_words("stego", *KEPT)).backbone.cache_features is True
