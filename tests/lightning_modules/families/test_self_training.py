"""Rounds of self-training: what a later one begins with, learns from, and how a killed one goes on."""

import shutil

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import config
from common.errors import ConfigError
from engine import setup
from engine.stages.maps import MapData
from engine.stages.stage import Stage
from lightning_modules.families.self_training import SelfTrained, weights_digest
from tests.conftest import Run, run_small, small_words

pytestmark = pytest.mark.train
QUICK = ["evaluation.panels=0", "trainer.val_every=100", "evaluation.kmeans.pictures=4"]
ROUNDS = "phases=[{share: 1}, {share: 1, method.round: 2}, {share: 1, method.round: 3}]"


class StopError(Exception):
    """Stands for a kill."""


def same(one: Run, two: Run) -> None:
    assert one.weights.keys() == two.weights.keys()
    assert [name for name, value in one.weights.items() if not torch.equal(value, two.weights[name])] == []


def test_a_round_begins_anew_and_learns_what_the_one_before_says(tmp_path, monkeypatch):
    """Its first weights are those of the first round's start, its teacher the network of the round before, and its
    labels are what that one predicts."""
    begun = {}
    start = SelfTrained.on_train_start

    def looks(self):
        start(self)
        labels = (
            None if self.round == 1 else [self.trainer.datamodule.pseudo.read(index, (48, 48)) for index in range(3)]
        )
        teacher = {name: value.clone() for name, value in self.teacher_head.copy.state_dict().items()}
        begun[self.round] = ({name: value.clone() for name, value in self.head.state_dict().items()}, teacher, labels)

    monkeypatch.setattr(SelfTrained, "on_train_start", looks)
    run = run_small("comus", tmp_path, "run", ROUNDS, *QUICK, f"cache.dir={tmp_path}", "trainer.max_steps=6")
    assert sorted(begun) == [1, 2, 3]
    for number in (2, 3):
        assert all(torch.equal(value, begun[1][0][name]) for name, value in begun[number][0].items())
    assert all(torch.equal(run.weights[f"teacher_head.copy.{name}"], value) for name, value in begun[3][1].items())
    assert any(not torch.equal(value, begun[3][1][name]) for name, value in begun[2][1].items())
    cfg, data = setup.build_data(config.compose(small_words("comus")))
    model = setup.build_model(cfg, data.meta)
    model.head.load_state_dict(begun[2][1])
    model.eval()
    for index in range(3):
        image = torch.from_numpy(data.source("train").read(index)[0]).permute(2, 0, 1)[None] / 255
        with torch.no_grad():
            logits = model.classify(model.embed(model.features(image)))
        ids = F.interpolate(logits, size=(48, 48), mode="bilinear", align_corners=False).argmax(1)[0]
        assert np.array_equal(begun[2][2][index], ids)


def test_a_trained_backbone_begins_anew_too(tmp_path):
    run = run_small(
        "comus", tmp_path, "run", *QUICK, f"cache.dir={tmp_path}", "backbone.frozen=false", "trainer.max_steps=3"
    )
    teacher = {name: v for name, v in run.weights.items() if name.startswith("teacher_backbone.copy.net.")}
    assert teacher
    own = {name: run.weights[name.replace("teacher_backbone.copy.", "backbone.")] for name in teacher}
    assert any(not torch.equal(own[name], value) for name, value in teacher.items())


@pytest.mark.parametrize("moment", ["relabelling", "first round", "cache lost"])
def test_a_run_killed_in_a_round_goes_on(tmp_path, monkeypatch, moment):
    """Killed while pictures are relabelled, in the first round, or in the second one with the cache lost after."""
    words = [*QUICK, "trainer.max_steps=6", "trainer.checkpoint_every=1", "method.stage.shard=4"]
    plain = run_small("comus", tmp_path, "plain", *words, f"cache.dir={tmp_path / 'a'}")
    own = [*words, f"cache.dir={tmp_path / 'b'}"]
    with monkeypatch.context() as patch:
        if moment == "relabelling":
            write, done = MapData.write, []

            def dies(self, number, found):
                if self.step.name == "relabelled2":
                    done.append(number)
                    if len(done) == 2:
                        raise StopError
                write(self, number, found)

            patch.setattr(MapData, "write", dies)
        else:
            last = 2 if moment == "first round" else 5
            step = SelfTrained.after_step

            def stops(self):
                if self.global_step == last:
                    raise StopError
                step(self)

            patch.setattr(SelfTrained, "after_step", stops)
        with pytest.raises(StopError):
            run_small("comus", tmp_path, "killed", *own)
    if moment == "cache lost":
        shutil.rmtree(tmp_path / "b")
    same(plain, run_small("comus", tmp_path, "killed", *own))


def test_a_later_round_alone_is_refused(tmp_path):
    cfg, data = setup.build_data(config.compose(small_words("comus", "method.round=2", f"cache.dir={tmp_path}")))
    model = setup.build_model(cfg, data.meta)
    setup.connect(model, data)
    with pytest.raises(ConfigError, match=r"^method\.round=2: a later round begins with the network of the one before"):
        Stage(cfg, data, model)


def test_relabelling_hangs_on_the_weights(tmp_path):
    head = setup.build_model(*built()).head
    digest = weights_digest(head)
    assert digest == weights_digest(head)
    with torch.no_grad():
        head.classifier.bias[0] += 1
    assert weights_digest(head) != digest


def built():
    cfg, data = setup.build_data(config.compose(small_words("comus")))
    return cfg, data.meta
